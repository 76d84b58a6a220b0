"""Attempts at the last exercise, a training of one's own."""

import mlflow
import numpy as np

from tests.exercises.attempts import two_sittings, wrong
from tests.exercises.makeshift import describe, log_model, register

OWN = {"exercise": "09.2"}


def child(number, steps=(1, 2, 3), params=None, **metrics):
    """Log a child that is better the higher its number."""
    with mlflow.start_run(run_name=f"trial {number}", nested=True) as run:
        mlflow.log_params({"alpha": number, "seed": 0} if params is None else params)
        for step in steps:
            mlflow.log_metric("val_accuracy", 0.5 + number / 10 + step / 100, step=step)
        mlflow.log_metrics(metrics)
    return run.info.run_id


def family(children, winner=-1):
    """Log a parent with the children that the function makes, and return its id."""
    with mlflow.start_run(run_name="own", tags=OWN) as run:
        ids = children()
        mlflow.log_input(mlflow.data.from_numpy(np.zeros(3), name="small"), "training")
        mlflow.set_tag("best_run_id", ids[winner])
    return run.info.run_id


def four():
    return [child(number) for number in range(4)]


def finish(parent, score=True, whole=True, description="the best of four", figure="curve.png"):
    """Log model, test score, figure and version to the parent."""
    with mlflow.start_run(run_id=parent):
        model = log_model("own")
        describe(model, whole)
        mlflow.log_metric("test_accuracy", 0.8, model_id=model.model_id if score else None)
        mlflow.log_text("drawn", figure)
    register("own", model, description=description)


@wrong("09.2", r"meets 6 of 10 points\..*Model: .* Found: no model\..*Test score: .* Found: none\.")
def only_the_family():
    family(four)


@wrong("09.2", r"meets 9 of 10 points\..*Winner: .* Found: run `trial 0` \(\w+\), but the best is run `trial 3`")
def the_first_as_the_winner():
    finish(family(four, winner=0))


@wrong("09.2", r"meets 9 of 10 points\..*Test score: .* Found: 4 runs have one, so the test data helped to choose")
def a_test_score_for_each_child():
    finish(family(lambda: [child(number, test_accuracy=0.8) for number in range(3)] + [child(3)]), score=True)


@wrong("09.2", r"meets 9 of 10 points\..*Test score: .* Found: it is on the run alone, without `model_id`")
def the_score_without_its_model():
    finish(family(four), score=False)


@wrong("09.2", r"meets 9 of 10 points\..*History: .* Found: 0 of 4 children; run .* has `val_accuracy` at 1 step")
def the_last_values_only():
    finish(family(lambda: [child(number, steps=(3,)) for number in range(4)]))


@wrong("09.2", r"meets 9 of 10 points\..*Parameters: .* Found: 4 children with 1 choice of parameters")
def the_same_parameters():
    finish(family(lambda: [child(number, params={"alpha": 1, "seed": 0}) for number in range(4)]))


@wrong(
    "09.2", r"meets 8 of 10 points\..*Figure: .* Found: `notes\.txt`\..*Version: .* Found: version 1 of `own`, which"
)
def no_figure_and_no_description():
    finish(family(four), figure="notes.txt", description="")


@wrong("09.2", r"meets 9 of 10 points\..*Model: .* Found: `own` without signature and input example")
def a_model_without_signature():
    finish(family(four), whole=False)


@two_sittings("09.2")
def the_model_tomorrow():
    parent = family(four)
    yield
    finish(parent)
