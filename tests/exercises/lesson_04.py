"""Attempts at the exercises of lesson 04."""

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema, TensorSpec

from tests.exercises.attempts import two_sittings, wrong
from tests.exercises.makeshift import log_model

WORDS, LOWEST = {"exercise": "04.1"}, {"exercise": "04.2"}
RAW = TensorSpec(np.dtype("uint8"), (-1, 28, 28))
WORD, NUMBER = ColSpec("string"), ColSpec("long")


def wrapped(taken, returned, accuracy=0.8, on_model=True):
    """Log a model with this signature and, at another step, its accuracy."""
    signature = ModelSignature(Schema([taken]), Schema([returned])) if taken else None
    with mlflow.start_run(tags=WORDS):
        model = log_model("words", signature=signature)
        mlflow.log_metric("accuracy", accuracy, step=1, model_id=model.model_id if on_model else None)


@wrong("04.1", r"takes float32 \(-1, 1, 28, 28\): that is the network itself")
def the_network_itself():
    image = TensorSpec(np.dtype("float32"), (-1, 1, 28, 28))
    wrapped(image, TensorSpec(np.dtype("float32"), (-1, 10)))


@wrong("04.1", r"takes uint8 \(-1, 28\): the first number is that of the images")
def one_image_without_its_axis():
    wrapped(TensorSpec(np.dtype("uint8"), (-1, 28)), WORD)


@wrong("04.1", r"takes uint8 \(1, 28, 28\): the first number is that of the images, and it must be free")
def a_batch_of_one():
    wrapped(TensorSpec(np.dtype("uint8"), (1, 28, 28)), WORD)


@wrong("04.1", r"takes float64 \(-1, 28, 28\): users have uint8 \(-1, 28, 28\)")
def pixels_divided_before_the_model():
    wrapped(TensorSpec(np.dtype("float64"), (-1, 28, 28)), WORD)


@wrong("04.1", r"returns long, and words are asked for")
def numbers_instead_of_words():
    wrapped(RAW, NUMBER)


@wrong("04.1", r"has `accuracy` 0\.328, .* Does `predict` divide them by 255")
def pixels_not_divided():
    wrapped(RAW, WORD, 0.328)


@wrong("04.1", r"has no `accuracy`; it is on the run alone")
def the_accuracy_on_the_run():
    wrapped(RAW, WORD, on_model=False)


@wrong("04.1", r"has no signature that can be read: give `log_model` two raw images")
def no_example():
    wrapped(None, None)


@two_sittings("04.1")
def the_accuracy_tomorrow():
    with mlflow.start_run(tags=WORDS) as run:
        model = log_model("words", signature=ModelSignature(Schema([RAW]), Schema([WORD])))
    yield
    with mlflow.start_run(run_id=run.info.run_id):
        mlflow.log_metric("accuracy", 0.8, model_id=model.model_id)


LOSSES, ACCURACIES = [0.9, 0.6, 0.7, 0.8, 0.8, 0.85], [0.6, 0.7, 0.72, 0.75, 0.8, 0.79]


def checkpoints(linked=True):
    """Log six models with their scores to the active run, and return the models' ids."""
    models = []
    for number, (loss, accuracy) in enumerate(zip(LOSSES, ACCURACIES, strict=True), 1):
        scores = {"val_loss": loss, "val_accuracy": accuracy}
        if not linked:
            mlflow.log_metrics(scores, step=10 * number)
        model = log_model(f"checkpoint-{number}", step=10 * number)
        if linked:
            mlflow.log_metrics(scores, step=10 * number, model_id=model.model_id)
        models.append(model.model_id)
    return models


def choose(number, scored=None, value=None):
    """Log six checkpoints and choose one; the test score belongs to `scored`."""
    with mlflow.start_run(tags=LOWEST):
        models = checkpoints()
        mlflow.set_tag("chosen", value or models[number - 1])
        mlflow.log_metric("test_accuracy", 0.7, step=99, model_id=scored and models[scored - 1])


@wrong("04.2", r"chose `checkpoint-6` with `val_loss` 0\.850; the lowest is 0\.600\. It is the last one")
def the_last_one():
    choose(6, 6)


@wrong("04.2", r"chose `checkpoint-5` with `val_loss` 0\.800; the lowest is 0\.600\. It has the best `val_accuracy`")
def the_best_by_accuracy():
    choose(5, 5)


@wrong("04.2", r"has `chosen = checkpoint-2`: none of its models has this id\. This is its name")
def the_name_instead_of_the_id():
    choose(2, 2, "checkpoint-2")


@wrong("04.2", r"6 of the 6 models of run .* have no `val_loss`.*It is on the run alone: log it after the model")
def scores_logged_before_the_model():
    with mlflow.start_run(tags=LOWEST):
        mlflow.set_tag("chosen", checkpoints(linked=False)[1])


@wrong("04.2", r"the chosen model `checkpoint-2` of run .* has no `test_accuracy`; it is on the run alone")
def the_test_score_on_the_run():
    choose(2)


@wrong("04.2", r"has `test_accuracy` on `checkpoint-1`, `checkpoint-3`, .*, too: the test images are for the chosen")
def all_scored_on_the_test_images():
    with mlflow.start_run(tags=LOWEST):
        models = checkpoints()
        mlflow.set_tag("chosen", models[1])
        for model in models:
            mlflow.log_metric("test_accuracy", 0.7, step=99, model_id=model)


@two_sittings("04.2")
def chosen_tomorrow():
    with mlflow.start_run(tags=LOWEST) as run:
        models = checkpoints()
    yield
    with mlflow.start_run(run_id=run.info.run_id):
        mlflow.set_tag("chosen", models[1])
        mlflow.log_metric("test_accuracy", 0.7, step=20, model_id=models[1])
