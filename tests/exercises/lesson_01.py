"""Attempts at the exercises of lesson 01."""

from demo_lib.tracking import truthful_status

import mlflow

from tests.exercises.attempts import two_sittings, wrong
from tests.exercises.makeshift import log_model

LOOP, BEST, ENDS = ({"exercise": f"01.{number}"} for number in (1, 2, 3))


def losses(steps, **params):
    with mlflow.start_run(tags=LOOP):
        mlflow.log_params({"steps_per_epoch": 18} | params)
        for step in steps:
            mlflow.log_metric("val_loss", 1 / (step + 1), step=step)


@wrong("01.1", r"at steps 1, 2 and 3: these are epochs.* the first epoch ends at 18")
def the_epoch_as_step():
    losses([1, 2, 3])


@wrong("01.1", r"steps 18, 18 and 18: the counter starts over")
def the_counter_reset():
    losses([18, 18, 18])


@wrong("01.1", r"has 1 value of `val_loss` \(steps 54\): log one an epoch")
def only_the_last_loss():
    losses([54])


@wrong("01.1", r"has no whole number in the parameter `steps_per_epoch`")
def images_instead_of_steps():
    losses([18, 36, 54], steps_per_epoch=17.2)


@wrong("01.1", r"at steps 17, 35 and 53; with 18 steps in an epoch they are 18, 36 and 54")
def counted_from_zero():
    losses([17, 35, 53])


@wrong(
    "01.1",
    r"2\.302, 2\.302 and 2\.302: it does not fall, nothing was learnt\. `train_epoch\(\)` trains only",
)
def a_generator_that_nobody_loops_over():
    with mlflow.start_run(tags=LOOP):
        mlflow.log_param("steps_per_epoch", 18)
        for step in (18, 36, 54):
            mlflow.log_metric("val_loss", 2.302, step=step)


@wrong("01.1", r"no whole number in the parameter `steps_per_epoch`, but a metric of that name")
def the_steps_as_a_metric():
    with mlflow.start_run(tags=LOOP):
        mlflow.log_metrics({"steps_per_epoch": 18, "val_loss": 0.5})


@two_sittings("01.1")
def the_last_epoch_tomorrow():
    with mlflow.start_run(tags=LOOP) as run:
        mlflow.log_param("steps_per_epoch", 18)
        mlflow.log_metric("val_loss", 1.8, step=18)
        mlflow.log_metric("val_loss", 1.0, step=36)
    yield
    with mlflow.start_run(run_id=run.info.run_id):
        mlflow.log_metric("val_loss", 0.7, step=54)


def trained():
    for step, accuracy in ((10, 0.6), (20, 0.8), (30, 0.7)):
        mlflow.log_metric("val_accuracy", accuracy, step=step)


@wrong("01.2", r"`best` at step 30, and its best `val_accuracy`, 0\.800, at step 20\. That is the last epoch")
def the_last_weights():
    with mlflow.start_run(tags=BEST):
        trained()
        model = log_model("best", step=30)
        mlflow.log_metric("test_accuracy", 0.7, step=30, model_id=model.model_id)


@wrong("01.2", r"the model `best` of run .* has no `test_accuracy`; it is on the run alone")
def the_score_without_its_model():
    with mlflow.start_run(tags=BEST) as run:
        trained()
        log_model("best", step=20)
    with mlflow.start_run(run_id=run.info.run_id):
        mlflow.log_metric("test_accuracy", 0.7)


@wrong("01.2", r"`best` at step 0, and its best `val_accuracy`, 0\.800, at step 20\. Give")
def the_model_without_a_step():
    with mlflow.start_run(tags=BEST):
        trained()
        model = log_model("best")
        mlflow.log_metric("test_accuracy", 0.7, model_id=model.model_id)


@wrong("01.2", r"has no model: log the best network")
def the_weights_as_a_file():
    with mlflow.start_run(tags=BEST):
        trained()
        mlflow.log_text("weights", "best.pt")


@wrong("01.2", r"the same `test_accuracy` and `val_accuracy`, 0\.8000")
def scored_on_the_validation_images():
    with mlflow.start_run(tags=BEST):
        trained()
        model = log_model("best", step=20)
        mlflow.log_metric("test_accuracy", 0.8, step=20, model_id=model.model_id)


@two_sittings("01.2")
def the_test_score_tomorrow():
    with mlflow.start_run(tags=BEST) as run:
        trained()
        model = log_model("best", step=20)
    yield
    with mlflow.start_run(run_id=run.info.run_id):
        mlflow.log_metric("test_accuracy", 0.7, step=20, model_id=model.model_id)


def ends_by(error, status=truthful_status):
    try:
        with mlflow.start_run(tags=ENDS), status():
            mlflow.log_metric("loss", 0.5)
            raise error
    except (ValueError, KeyboardInterrupt):
        pass


@wrong("01.3", r"is FINISHED: no exception left its `with` block\. Catch it outside")
def caught_inside():
    with mlflow.start_run(tags=ENDS):
        mlflow.log_metric("loss", 0.5)
        try:
            raise ValueError
        except ValueError:
            pass


@wrong("01.3", r"is FAILED without a tag `error`")
def interrupted_without_truthful_status():
    from contextlib import nullcontext

    ends_by(KeyboardInterrupt(), nullcontext)


@wrong("01.3", r"is FINISHED.* The tag `status = KILLED` is only a text")
def the_status_as_a_tag():
    with mlflow.start_run(tags=ENDS):
        mlflow.log_metric("loss", 0.5)
        mlflow.set_tag("status", "KILLED")


@wrong("01.3", r"there is a good run that is FAILED, none that is KILLED")
def two_failures():
    ends_by(ValueError("one"))
    ends_by(ValueError("two"))


@two_sittings("01.3")
def one_failed_today_one_killed_tomorrow():
    ends_by(ValueError("a bad value"))
    yield
    ends_by(KeyboardInterrupt())
