"""What the exercises of lesson 00 expect: runs, parameters, metrics."""

from demo_lib.exercises.evidence import Evidence
from demo_lib.exercises.judging import Expectations, counted, exercise, finished, listed, named
from demo_lib.exercises.quiz import Question, question

from mlflow.entities import Run

MEAN = 60, 90  # between which the mean of a few hundred images' pixels lies
MEANS = 83, 57, 96, 66, 98, 35, 85, 43, 90, 77  # of the classes; of some two hundred images within 15 of it


def _every_seed(runs: list[Run], evidence: Evidence) -> Expectations:
    seeds = {run.data.params["seed"] for run in runs}
    missing = sorted({"0", "1", "2"} - seeds)
    yield not missing, f"there is a good run for seed {listed(sorted(seeds))}, none for {listed(missing)}."
    means = {run.data.metrics["mean_pixel"] for run in runs}
    yield (
        len(means) > 1,
        f"all seeds have `mean_pixel = {max(means):.4g}`: another seed draws other images. Give it to `TrainConfig`.",
    )
    return (
        "Three runs, each with its own seed and the mean that came out. Look at them side by side: tick them in the "
        "experiment's list and press Compare."
    )


@exercise("00.1", "one run for each seed", together=_every_seed)
def one_run_for_each_seed(run: Run, evidence: Evidence) -> Expectations:
    """Judge one of the runs."""
    params, metrics = run.data.params, run.data.metrics
    yield (
        run.info.status != "FAILED" or "seed" not in params,
        f"{named(run)} is FAILED and has `seed = {params.get('seed')}`: a parameter can't change. Open one run for "
        "each seed, inside of the loop.",
    )
    yield finished(run)
    hint = ", but a metric of that name: what you chose is a parameter, for `log_param`" if "seed" in metrics else ""
    yield "seed" in params, f"{named(run)} has no parameter `seed`{hint}."
    yield params["seed"] in ("0", "1", "2"), f"{named(run)} has `seed = {params['seed']}`: 0, 1 and 2 are asked for."
    there = "the parameter" if "mean_pixel" in params else listed(f"`{name}`" for name in metrics)
    yield "mean_pixel" in metrics, f"{named(run)} has no metric `mean_pixel`; it has {there}."
    mean = metrics["mean_pixel"]
    yield (
        MEAN[0] < mean < MEAN[1],
        f"{named(run)} has `mean_pixel = {mean:.4g}`: the mean of all pixels, from 0 to 255, is near 73.",
    )
    return f"{named(run)} is good."


@exercise("00.2", "ten values, one history")
def ten_values_one_history(run: Run, evidence: Evidence) -> Expectations:
    """Judge a run that keeps a mean for each class."""
    yield finished(run)
    metrics = run.data.metrics
    yield (
        "mean_pixel" in metrics,
        f"{named(run)} has no metric `mean_pixel`, but {counted(len(metrics), 'metric')} of other names: one name, "
        "ten steps.",
    )
    points = evidence.history(run, "mean_pixel")
    yield (
        len(points) == 10,
        f"{named(run)} has {counted(len(points), 'value')} of `mean_pixel`, and ten are asked for: one run, ten steps.",
    )
    steps = [point.step for point in points]
    yield (
        len(set(steps)) > 1,
        f"{named(run)} has ten values of `mean_pixel`, all at step {steps[0]}: give each its class as the `step`.",
    )
    yield steps == [*range(10)], f"{named(run)} has the steps {listed(steps)}: classes go from 0 to 9."
    for point, mean in zip(points, MEANS, strict=True):
        yield (
            abs(point.value - mean) < 15,
            f"{named(run)} has {point.value:.4g} at step {point.step}: the mean of class {point.step} is near "
            f"{mean}. Take all images of the class.",
        )
    return (
        "Ten values under one name, each at its step. In the UI, the run's tab Model metrics draws them as one curve: "
        "which class is the darkest?"
    )


@question("00")
def _status(evidence: Evidence) -> Question:
    return Question(
        "A notebook calls `mlflow.log_metric` outside of any `with` block. Then you close the notebook's kernel by "
        "force. Which status does the run have?",
        "RUNNING",
        "Nobody ended the run that MLflow opened, so the record still says that it runs.",
        {
            "FINISHED": "Only `end_run`, or the end of a `with` block, writes that.",
            "KILLED": "MLflow is not told that the process was killed. Only who closes the run can say so.",
            "There is no run": "MLflow opens a run of its own when you log without one.",
        },
    )


@question("00")
def _kind(evidence: Evidence) -> Question:
    return Question(
        "You draw the images with seed 7, and 2,000 of them come out. Which call is right for the seed?",
        '`mlflow.log_param("seed", 7)`',
        "You chose the seed before the run: it is a parameter.",
        {
            '`mlflow.log_metric("seed", 7)`': "A metric is a number that came out, and it can have many values.",
            '`mlflow.set_experiment("seed 7")`': "An experiment holds runs that belong together, whatever their seeds.",
            '`mlflow.start_run("seed 7")`': "The first argument of `start_run` is the id of a run to open again.",
        },
    )


@question("00")
def _own_text(evidence: Evidence) -> Question:
    of_you = next((run for run in evidence.runs_of("00_start_here") if "train_images" in run.data.params), None)
    value = of_you.data.params["train_images"] if of_you else "2000"
    whose = f"your run `{of_you.info.run_name}`" if of_you else "a run with `train_images = 2000`"
    return Question(
        f'What does `run.data.params["train_images"]` give for {whose}?',
        f'the text `"{value}"`',
        "Parameters come back as text, metrics as numbers.",
        {
            f"the number `{value}`": "The store keeps parameters as text: convert them before you calculate.",
            f"the number `{value}.0`": "Metrics come back like this. `train_images` is a parameter.",
            f"a list, `[{value}]`": "A parameter has one value only. A metric has a history.",
        },
    )
