"""Attempts at the exercises of lesson 08."""

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, Param

from tests.exercises.attempts import two_sittings, wrong
from tests.exercises.makeshift import log_model, setup_runs

ONE, FAMILY = "08.1", "08.2"
PARENT = "mlflow.parentRunId"


def to_move():
    """Return the run to move; make one if the setup has not."""
    if not setup_runs(ONE):
        with mlflow.start_run(tags={"setup": ONE}):
            mlflow.log_params({"epochs": 2, "seed": 0})
            for step in (5, 10):
                mlflow.log_metric("val_loss", 3 / step, step=step)
            mlflow.log_input(mlflow.data.from_numpy(np.zeros(3), name="small"), "training")
            mlflow.log_text("three layers", "model_summary.txt")
            log_model("best_model", step=10)
    return setup_runs(ONE)[0]


def all_points(run):
    return [point for name in run.data.metrics for point in MlflowClient().get_metric_history(run.info.run_id, name)]


def latest(run):
    return [Metric(key, value, run.info.end_time, 0) for key, value in run.data.metrics.items()]


def copy(run, points=all_points, model=True, origin=True, params=True, **tags):
    """Copy a run with its files, and return the new id."""
    client = MlflowClient()
    tags = run.data.tags | ({"copied_from": run.info.run_id} if origin else {}) | tags
    new = client.create_run(run.info.experiment_id, tags={key: value for key, value in tags.items() if value})
    new_id = new.info.run_id
    client.log_batch(new_id, points(run), [Param(*each) for each in run.data.params.items()] if params else [])
    client.log_inputs(new_id, run.inputs.dataset_inputs)
    if client.list_artifacts(run.info.run_id):
        client.log_artifacts(new_id, mlflow.artifacts.download_artifacts(run_id=run.info.run_id))
    if model:
        with mlflow.start_run(run_id=new_id):
            log_model("best_model")
    client.set_terminated(new_id)
    return new_id


@wrong("08.1", r"has \d points? of its metrics, run .* has \d+, all at step 0: give each point its `step`")
def latest_values_only():
    copy(to_move(), latest, exercise=ONE)


@wrong("08.1", r"has the values of run .*, but at other steps")
def steps_counted_anew():
    copy(
        to_move(),
        lambda run: [Metric(p.key, p.value, p.timestamp, n) for n, p in enumerate(all_points(run))],
        exercise=ONE,
    )


@wrong("08.1", r"has all values at their steps, but with the time of the copying")
def without_timestamps():
    copy(to_move(), lambda run: [Metric(p.key, p.value, 1, p.step) for p in all_points(run)], exercise=ONE)


@wrong("08.1", r"has no model of its own: it names the model of another run as its output")
def the_old_model_linked():
    run = to_move()
    new = copy(run, model=False, exercise=ONE)
    MlflowClient().log_outputs(new, [LoggedModelOutput(run.outputs.model_outputs[0].model_id, 0)])


@wrong("08.1", r"has no model of its own: files are no model")
def files_only():
    copy(to_move(), model=False, exercise=ONE)


@wrong("08.1", r"has no tag `copied_from`, with the id of the run that it is a copy of")
def without_the_old_id():
    copy(to_move(), origin=False, exercise=ONE)


@wrong("08.1", r"lacks parameters of run .*, or has other values of them: `\w+` and `\w+`")
def without_parameters():
    copy(to_move(), params=False, exercise=ONE)


@two_sittings("08.1")
def the_model_tomorrow():
    new = copy(to_move(), model=False, exercise=ONE)
    yield
    with mlflow.start_run(run_id=new):
        log_model("best_model")


def family():
    """Return the parent of the family to move, and its children; make them if the setup has not."""
    if not setup_runs(FAMILY):
        with mlflow.start_run(run_name="small study", tags={"setup": FAMILY}):
            mlflow.log_metric("best_val_accuracy", 0.8)
            for number in range(3):
                with mlflow.start_run(run_name=f"trial {number}", nested=True, tags={"setup": FAMILY}):
                    mlflow.log_param("number", number)
                    for step in (1, 2):
                        mlflow.log_metric("val_accuracy", number / 10 + step / 100, step=step)
    found = setup_runs(FAMILY)
    parent = next(run for run in found if PARENT not in run.data.tags)
    return parent, [run for run in found if PARENT in run.data.tags]


def move(points=all_points, count=3, above=None, **options):
    """Copy the family, so many of its children, and return the new parent's id."""
    parent, children = family()
    new = copy(parent, model=False, exercise=FAMILY)
    for child in children[:count]:
        copy(child, points, model=False, **{PARENT: new} | (above or {}) | options)
    return new


@wrong(
    "08.2", r"has no children: run `trial \d` .*, a copy of a child, still names the old parent in `mlflow.parentRunId`"
)
def the_old_parent_kept():
    move(above={PARENT: family()[0].info.run_id})


@wrong("08.2", r"has no children: run `trial \d` .*, a copy of a child, has no tag `mlflow.parentRunId`")
def children_without_parent():
    move(above={PARENT: None})


@wrong("08.2", r"has no children, and run .* has 3: there is no copy of trial 0, trial 1 and trial 2")
def the_parent_alone():
    move(count=0)


@wrong("08.2", r"run `trial \d` .* has 1 point of its metrics, run `trial \d` .* has \d, all at step 0")
def latest_values_of_the_children():
    move(latest)


@wrong("08.2", r"run `trial \d` .*, a child of run `small study` .*, has no tag `copied_from`")
def children_without_the_old_id():
    move(origin=False)


@two_sittings("08.2")
def the_children_tomorrow():
    new = move(count=1)
    yield
    for child in family()[1][1:]:
        copy(child, model=False, **{PARENT: new})
