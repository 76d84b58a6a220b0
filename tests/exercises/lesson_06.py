"""Attempts at the exercises of lesson 06."""

import mlflow

from tests.exercises.attempts import two_sittings, wrong
from tests.exercises.makeshift import log_model, register, setup_runs

SCORE, CALLS = {"exercise": "06.1"}, {"exercise": "06.2"}
NAME = "exercise-scorer"


def scorers():
    """Return the ids of the models `previous` and `champion`; make them as the setup does if they are not there."""
    if not setup_runs("06.1"):
        with mlflow.start_run(tags={"setup": "06.1"}):
            register(NAME, log_model("classifier"), "previous")
            register(NAME, log_model("classifier"), "champion")
    client = mlflow.MlflowClient()
    return [
        client.get_model_version_by_alias(NAME, alias).source.rpartition("/")[2] for alias in ("previous", "champion")
    ]


def score(rows=500, accuracy=0.8, truth=("Bag", "Coat"), file="predictions.json", **link):
    with mlflow.start_run(tags=SCORE):
        truths = [truth[0] if row < 0.8 * rows else truth[1] for row in range(rows)]
        mlflow.log_table({"label": ["Bag"] * rows, "truth": truths}, file)
        mlflow.log_metric("test_accuracy", accuracy, **link)


@wrong("06.1", r"`test_accuracy` of run .* belongs to none of the setup's models: give `log_metric` the `model_id`")
def no_model_id():
    scorers()
    score()


@wrong("06.1", r"belongs to another model, that of the alias `champion`: the version `previous` is asked for")
def the_champion():
    score(model_id=scorers()[1])


@wrong("06.1", r"of run .* has 10000 rows, one an image: 500 images are asked for")
def all_test_images():
    score(10_000, model_id=scorers()[0])


@wrong("06.1", r"has `test_accuracy = 0\.772`, but 0\.8 of its table's rows are right")
def the_accuracy_of_other_images():
    score(accuracy=0.772, model_id=scorers()[0])


@wrong("06.1", r"has a `label` such as `Bag` and a `truth` such as `4`: no row can be right")
def numbers_as_truth():
    score(accuracy=0.0, truth=(8, 4), model_id=scorers()[0])


@wrong("06.1", r"has no table `predictions\.json`: it has `predictions\.parquet`")
def another_file():
    score(file="predictions.parquet", model_id=scorers()[0])


@two_sittings("06.1")
def the_score_tomorrow():
    previous, _ = scorers()
    with mlflow.start_run(tags=SCORE) as run:
        mlflow.log_table({"label": ["Bag"] * 500, "truth": ["Bag"] * 400 + ["Coat"] * 100}, "predictions.json")
    yield
    with mlflow.start_run(run_id=run.info.run_id):
        mlflow.log_metric("test_accuracy", 0.8, model_id=previous)


@mlflow.trace
def classify(start, stop):
    with mlflow.start_span("decode"):
        return ["Bag"] * (stop - start)


def ten(call=classify, size=64, calls=10):
    for number in range(calls):
        call(size * number, size * (number + 1))


@wrong("06.2", r"a trace of run .* has the spans `classify`: inside of the traced function, open one")
def no_span():
    @mlflow.trace
    def classify(start, stop):
        return ["Bag"] * (stop - start)

    with mlflow.set_active_model(model_id=scorers()[1]), mlflow.start_run(tags=CALLS):
        ten(classify)


@wrong("06.2", r"has no trace.*A call after the block makes a trace that belongs to no run")
def called_after_the_block():
    with mlflow.set_active_model(model_id=scorers()[1]):
        with mlflow.start_run(tags=CALLS):
            pass
        ten()


@wrong("06.2", r"10 of 10 traces of run .* name no model: call `mlflow\.set_active_model`")
def no_active_model():
    scorers()
    with mlflow.start_run(tags=CALLS):
        ten()


@wrong("06.2", r"has 1 trace: each call makes one, and ten calls are asked for")
def one_call_of_640():
    with mlflow.set_active_model(model_id=scorers()[1]), mlflow.start_run(tags=CALLS):
        ten(size=640, calls=1)


@wrong("06.2", r"names a model which is not the champion's but that of the alias `previous`")
def the_version_before():
    with mlflow.set_active_model(model_id=scorers()[0]), mlflow.start_run(tags=CALLS):
        ten()


@wrong("06.2", r"returned no list of words: its result is kept as `\[8, 8, 8")
def numbers_and_no_words():
    @mlflow.trace
    def classify(start, stop):
        with mlflow.start_span("decode"):
            return [8] * (stop - start)

    with mlflow.set_active_model(model_id=scorers()[1]), mlflow.start_run(tags=CALLS):
        ten(classify)


@two_sittings("06.2")
def half_of_the_calls_tomorrow():
    with mlflow.set_active_model(model_id=scorers()[1]):
        with mlflow.start_run(tags=CALLS) as run:
            ten(calls=5)
        yield
        with mlflow.start_run(run_id=run.info.run_id):
            ten(calls=5)
