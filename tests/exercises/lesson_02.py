"""Attempts at the exercises of lesson 02."""

import time
from contextlib import suppress

from demo_lib.tracking import truthful_status

import mlflow
import optuna

from tests.exercises.attempts import two_sittings, wrong

SIX, WINNER, NIGHT = ({"exercise": f"02.{number}"} for number in (1, 2, 3))


def three_epochs(steps=(9, 18, 27)):
    for step in steps:
        mlflow.log_metric("val_accuracy", 0.5 + step / 100, step=step)


def six(epochs=three_epochs, jobs=2, **options):
    """Run six trials in two threads."""

    def objective(trial):
        with mlflow.start_run(run_name=f"trial {trial.number}", **options):
            epochs()
            time.sleep(0.1)  # so that two are open at once
        return 0.5

    optuna.create_study().optimize(objective, n_trials=6, n_jobs=jobs)


@wrong("02.1", r"has no children, but 6 runs without a parent began at the same time")
def only_nested():
    with mlflow.start_run(tags=SIX):
        six(nested=True)


@wrong("02.1", r"is FAILED and has no children: `start_run` refuses a second open run")
def not_nested():
    def objective(trial):
        with mlflow.start_run(run_name=f"trial {trial.number}"):
            return 0.5

    with suppress(Exception), mlflow.start_run(tags=SIX):
        optuna.create_study().optimize(objective, n_trials=6)


@wrong("02.1", r"6 children of run .* began after it had ended.* inside of the parent's `with` block")
def optimize_after_the_parents_block():
    with mlflow.start_run(tags=SIX) as parent:
        pass
    six(parent_run_id=parent.info.run_id)


@wrong("02.1", r"a child of run .*, has `val_accuracy` at 2 of 3 epochs \(steps 9 and 18\)")
def two_of_three_epochs():
    with mlflow.start_run(tags=SIX) as parent:
        six(lambda: three_epochs((9, 18)), nested=True, parent_run_id=parent.info.run_id)


@wrong("02.1", r"the children of run .* ran one after the other: `n_jobs=2` lets two run at once")
def one_at_a_time():
    with mlflow.start_run(tags=SIX) as parent:
        six(jobs=1, nested=True, parent_run_id=parent.info.run_id)


@wrong("02.1", r"began while run .* was open, and is still RUNNING: something was logged before `start_run`")
def trained_before_the_child_run():
    def objective(trial):
        three_epochs()
        with mlflow.start_run(run_name=f"trial {trial.number}", nested=True):
            return 0.5

    with mlflow.start_run(tags=SIX):
        optuna.create_study().optimize(objective, n_trials=2, n_jobs=2)


@wrong("02.1", r"is itself nested in a run: tag the parent")
def the_tag_on_a_child():
    with mlflow.start_run() as parent:
        six(nested=True, parent_run_id=parent.info.run_id)
    child = mlflow.search_runs(output_format="list")[0]
    mlflow.MlflowClient().set_tag(child.info.run_id, "exercise", "02.1")


@two_sittings("02.1")
def the_tag_forgotten_until_tomorrow():
    with mlflow.start_run(tags={"exercise": "2.1"}) as parent:
        six(nested=True, parent_run_id=parent.info.run_id)
    yield
    mlflow.MlflowClient().set_tag(parent.info.run_id, "exercise", "02.1")


def child(number, epochs, status="FINISHED", first=1):
    """Log a child run of so many epochs, better the lower its number."""
    with mlflow.start_run(run_name=f"trial {number}", nested=True) as run:
        mlflow.log_param("number", number)
        for epoch in range(1, epochs + 1):
            mlflow.log_metric("val_accuracy", 0.9 - number / 100 - 0.3 / epoch, step=epoch - 1 + first)
        mlflow.end_run(status)
    return run.info.run_id


def pruned_study(status="KILLED"):
    return [child(number, 5 if number < 6 else 2, "FINISHED" if number < 6 else status) for number in range(10)]


@wrong("02.2", r"run `trial 6` .* has 2 of 5 epochs and is FAILED: `TrialPruned` left its `with` block")
def pruned_inside_the_block():
    with mlflow.start_run(tags=WINNER):
        pruned_study("FAILED")


@wrong("02.2", r"has 2 of 5 epochs and is FINISHED: as if it were done")
def pruned_without_end_run():
    with mlflow.start_run(tags=WINNER):
        mlflow.set_tag("best_run_id", pruned_study("FINISHED")[0])


@wrong("02.2", r"has no tag `best_run_id`\. It is a parameter there")
def the_winner_as_a_parameter():
    with mlflow.start_run(tags=WINNER):
        mlflow.log_param("best_run_id", pruned_study()[0])


@wrong("02.2", r"has `best_run_id = trial 0`: no child has this id, though run `trial 0`")
def the_name_instead_of_the_id():
    with mlflow.start_run(tags=WINNER):
        pruned_study()
        mlflow.set_tag("best_run_id", "trial 0")


@wrong("02.2", r"names a child with `val_accuracy` 0\.790 as the winner.* the best has 0\.840")
def the_last_instead_of_the_best():
    with mlflow.start_run(tags=WINNER):
        mlflow.set_tag("best_run_id", pruned_study()[5])


@wrong("02.2", r"at steps 0, 1, 2, 3 and 4: the step is the epoch, from 1 on")
def epochs_counted_from_zero():
    with mlflow.start_run(tags=WINNER):
        ids = [child(number, 5, first=0) for number in range(8)]
        mlflow.set_tag("best_run_id", ids[0])


@two_sittings("02.2")
def the_winner_named_tomorrow():
    with mlflow.start_run(tags=WINNER) as parent:
        ids = pruned_study()
    yield
    with mlflow.start_run(run_id=parent.info.run_id):
        mlflow.set_tag("best_run_id", ids[0])


def trials(numbers, interrupted=None):
    for number in numbers:
        with mlflow.start_run(run_name=f"trial {number}", nested=True), truthful_status():
            mlflow.log_param("number", number)
            if number == interrupted:
                raise KeyboardInterrupt


def interrupted_night():
    with suppress(KeyboardInterrupt), mlflow.start_run(tags=NIGHT) as parent, truthful_status():
        trials(range(3), interrupted=2)
    return parent.info.run_id


@wrong("02.3", r"has trial 0, 1 and 2 twice: the study began anew")
def the_study_in_memory():
    with mlflow.start_run(run_id=interrupted_night()):
        trials(range(5))


@wrong("02.3", r"the study has two parents\. Open the first parent again")
def another_parent_for_the_rest():
    interrupted_night()
    with mlflow.start_run(tags=NIGHT):
        trials(range(3, 6))


@wrong("02.3", r"has 2 FINISHED children: the study goes on until there are five")
def interrupted_and_left():
    interrupted_night()


@wrong("02.3", r"has no KILLED child, but run `trial 2` .* is FAILED: add `truthful_status\(\)`")
def the_child_without_truthful_status():
    with suppress(KeyboardInterrupt), mlflow.start_run(tags=NIGHT) as parent:
        trials(range(2))
        with mlflow.start_run(run_name="trial 2", nested=True):
            mlflow.log_param("number", 2)
            raise KeyboardInterrupt
    with mlflow.start_run(run_id=parent.info.run_id):
        trials(range(3, 6))


@two_sittings("02.3")
def the_rest_tomorrow():
    parent = interrupted_night()
    yield
    with mlflow.start_run(run_id=parent):
        trials(range(3, 6))
