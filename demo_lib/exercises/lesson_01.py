"""What the exercises of lesson 01 expect: steps, models, and how a run ends."""

from math import isnan

from demo_lib.exercises.evidence import Evidence, metrics_of
from demo_lib.exercises.judging import Expectations, counted, exercise, finished, has_metric, listed, named
from demo_lib.exercises.quiz import Question, best_and_others, question

from mlflow.entities import Run


@exercise("01.1", "a loop of your own, by step")
def a_loop_by_step(run: Run, evidence: Evidence) -> Expectations:
    """Judge a run with a validation loss for each of three epochs."""
    yield finished(run)
    given = run.data.params.get("steps_per_epoch", "")[:9]
    kind = ", but a metric of that name" if "steps_per_epoch" in run.data.metrics else ""
    yield (
        given.isdecimal() and int(given) > 1,
        f"{named(run)} has no whole number in the parameter `steps_per_epoch`{kind}.",
    )
    per_epoch, points = int(given), evidence.history(run, "val_loss")
    steps = [point.step for point in points]
    yield (
        bool(points),
        f"{named(run)} has no metric `val_loss`; it has {listed(f'`{each}`' for each in run.data.metrics)}.",
    )
    yield (
        len(points) == 3,
        f"{named(run)} has {counted(len(points), 'value')} of `val_loss` (steps {listed(steps)}): log one an epoch.",
    )
    yield (
        steps != [1, 2, 3] and steps != [0, 1, 2],
        f"{named(run)} has `val_loss` at steps {listed(steps)}: these are epochs. The step counts batches, so the "
        f"first epoch ends at {per_epoch}.",
    )
    yield (
        len(set(steps)) == 3,
        f"{named(run)} has three values of `val_loss`, but steps {listed(steps)}: the counter starts over. Set it to 0 "
        "before the loop over the epochs, not inside.",
    )
    expected = [per_epoch * epoch for epoch in (1, 2, 3)]
    yield (
        steps == expected,
        f"{named(run)} has `val_loss` at steps {listed(steps)}; with {per_epoch} steps in an epoch they are "
        f"{listed(expected)}.",
    )
    losses = [point.value for point in points]
    yield (
        losses[-1] < losses[0],
        f"{named(run)} has `val_loss` {listed(losses)}: it does not fall, nothing was learnt. `train_epoch()` "
        "trains only while a loop takes its values.",
    )
    return (
        f"Three losses at steps {listed(steps)}, from {points[0].value:.3f} to {points[-1].value:.3f}. With the same "
        "step, a training loss would lie on the same axis: `train_loss` of lesson 01 does."
    )


@exercise("01.2", "the best epoch's model, and its test score")
def the_best_model(run: Run, evidence: Evidence) -> Expectations:
    """Judge a run with a model that is linked to its best epoch and to its test score."""
    yield finished(run)
    points = evidence.history(run, "val_accuracy")
    yield (
        len(points) > 2,
        f"{named(run)} has {counted(len(points), 'value')} of `val_accuracy`: log one after each epoch.",
    )
    steps = [point.step for point in points]
    yield (
        len(set(steps)) == len(steps),
        f"{named(run)} has `val_accuracy` at steps {listed(steps)}: each needs its own.",
    )
    models = evidence.models(run)
    yield bool(models), f"{named(run)} has no model: log the best network with `mlflow.pytorch.log_model`."
    highest = max((point.value for point in points if not isnan(point.value)), default=None)
    yield highest is not None, f"{named(run)} has no `val_accuracy` that is a number."
    best = [point.step for point in points if point.value == highest]
    at = {model.name: evidence.model_step(model) for model in models}
    good = [model for model in models if at[model.name] in best]
    found = listed(f"`{name}` at step {step}" for name, step in at.items())
    last = " That is the last epoch, not the best." if set(at.values()) == {steps[-1]} else ""
    yield (
        bool(good),
        f"{named(run)} has {found}, and its best `val_accuracy`, {highest:.3f}, at step {best[0]}.{last} Give "
        "`log_model` the `step` of the best epoch.",
    )
    model = next((each for each in good if "test_accuracy" in metrics_of(each)), good[0])
    yield has_metric(run, model, "test_accuracy")
    score = metrics_of(model)["test_accuracy"]
    yield (
        score != highest,
        f"{named(run)} has the same `test_accuracy` and `val_accuracy`, {score:.4f}: score the test images.",
    )
    return (
        f"The model `{model.name}` is at step {best[0]}, where `val_accuracy` is highest, and its test score "
        "is its own. In the UI, the experiment's page Models lists it with both."
    )


def _both_ends(runs: list[Run], evidence: Evidence) -> Expectations:
    statuses = {run.info.status for run in runs}
    missing = sorted({"FAILED", "KILLED"} - statuses)
    yield not missing, f"there is a good run that is {listed(statuses)}, none that is {listed(missing)}."
    return (
        "One run FAILED, one KILLED, and each tells why in its tag `error`. In the UI both have a red cross: only the "
        "run's page says which it is."
    )


@exercise("01.3", "two runs that end badly", together=_both_ends)
def two_bad_ends(run: Run, evidence: Evidence) -> Expectations:
    """Judge a run that failed or was killed."""
    tags, status = run.data.tags, run.info.status
    claimed = f" The tag `status = {tags['status']}` is only a text." if "status" in tags else ""
    yield (
        status != "FINISHED",
        f"{named(run)} is FINISHED: no exception left its `with` block.{claimed} Catch it outside of the block.",
    )
    yield status in ("FAILED", "KILLED"), f"{named(run)} is {status}: it must end, by an error or an interruption."
    yield (
        bool(run.data.metrics),
        f"{named(run)} is {status} and has no metric: log one before the error, and see that it is still there.",
    )
    yield (
        "error" in tags,
        f"{named(run)} is {status} without a tag `error`: `with mlflow.start_run(...), truthful_status():` sets it, "
        "and ends an interrupted run KILLED.",
    )
    return f"{named(run)} is {status}: {tags['error']}"


@question("01")
def _lowest_loss(evidence: Evidence) -> Question:
    """Ask about the learner's own runs, if three of them have a loss."""
    losses = {}
    tried = [run for run in evidence.runs if run.data.tags.get("exercise", "").startswith("01")]
    for run in evidence.runs_of("01_track_a_run") + tried:
        if "val_loss" in run.data.metrics and run.info.status == "FINISHED":
            losses[f"`{run.info.run_name}` ({run.info.run_id[:6]})"] = run.data.metrics["val_loss"]
    if (ranked := best_and_others(losses, lowest=True)) is None:
        return Question(
            "A run has `val_loss` 0.52 at step 22, 0.40 at step 44 and 0.43 at step 66. What does "
            '`run.data.metrics["val_loss"]` give?',
            "0.43",
            "It is the latest value, that of the highest step.",
            {
                "0.40": "That is the lowest. The store does not know that lower is better.",
                "0.52": "That is the first. A later value takes its place.",
                "all three": "`get_metric_history` gives all of them.",
            },
        )
    (best, low), others = ranked
    return Question(
        "Which of these runs of yours has the lowest validation loss at its end?",
        best,
        f"It ended at {low:.4f}.",
        {name: f"It ended at {loss:.4f}, and one of the others is lower." for name, loss in others},
    )


@question("01")
def _same_axis(evidence: Evidence) -> Question:
    return Question(
        "You log `train_loss` after every batch and `val_loss` after every epoch. Which `step` does `val_loss` get?",
        "the number of batches so far",
        "Then both curves share one axis, and you see which training loss goes with it.",
        {
            "the number of the epoch": "Then epoch 3 stands beside batch 3, at the far left of the training loss.",
            "none": "Without a step each value is at step 0, on top of the others.",
            "the batch within the epoch": "It is the same number at the end of every epoch.",
        },
    )


@question("01")
def _which_images(evidence: Evidence) -> Question:
    return Question(
        "You trained eight epochs and keep the one with the best accuracy. Which accuracy do you report?",
        "that on the test images, of the kept epoch",
        "They had no part in the choice.",
        {
            "the best one on the validation images": "The best of eight is partly luck: it looks better than it is.",
            "the best one on the test images, of all epochs": "Then the test images made the choice.",
            "that on the training images": "The network has seen them, and may know them by heart.",
        },
    )
