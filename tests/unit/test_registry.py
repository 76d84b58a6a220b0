"""The registry: the gate before the champion, what it records, the way back, and what the user is told."""

import os
import shutil
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

from demo_lib import registry
from demo_lib.config import TrainConfig
from demo_lib.data import CLASSES, load_data
from demo_lib.packaging import raw_images
from demo_lib.registry import RegistryError, find_champion, first_champion, promote, train_classifier
from demo_lib.tracking import connect, open_store

import mlflow
import pytest
import requests
from mlflow import MlflowClient

TINY = {"channels": 4, "batch_size": 32, "log_every": 100, "device": "cpu"}
CONFIGS = {
    "poor": TrainConfig(**TINY, train_images=200, epochs=1, learning_rate=1e-6),
    "fair": TrainConfig(**TINY, train_images=700, epochs=1, seed=2),
    "good": TrainConfig(**TINY, train_images=2_000, epochs=3),
}


@pytest.fixture(scope="module")
def trained(template, tmp_path_factory):
    """A home with a store that has the three classifiers, and what MLflow made of them, by name."""
    home = tmp_path_factory.mktemp("trained")
    (home / "store").mkdir()
    shutil.copy(template / "store" / "mlflow.db", home / "store" / "mlflow.db")
    (home / "data").symlink_to(template / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEMO_HOME", str(home))
        models = {name: train_classifier(config) for name, config in CONFIGS.items()}
        mlflow.set_tracking_uri(None)
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    return home, models


@pytest.fixture
def versions(home, trained):
    """The numbers of the three classifiers as versions of the model `m`, in a registry of the test's own, by name."""
    shutil.copy(trained[0] / "store" / "mlflow.db", home / "store" / "mlflow.db")
    open_store()
    numbers = {name: str(mlflow.register_model(model.model_uri, "m").version) for name, model in trained[1].items()}
    return SimpleNamespace(**numbers)


def aliases():
    return {alias: str(number) for alias, number in MlflowClient().get_registered_model("m").aliases.items()}


def tags(version):
    return MlflowClient().get_model_version("m", version).tags


def raising(error):
    raise error


def set_champion(version):
    MlflowClient().set_registered_model_alias("m", "champion", version)


def test_the_first_champion_needs_no_gain_and_is_right_as_often_as_its_run_says(versions, trained):
    decision = promote("m", versions.good)
    assert (decision.decision, decision.champion_version) == ("promoted", None)
    history = MlflowClient().get_metric_history(trained[1]["good"].run_id, "val_accuracy")
    assert decision.accuracy == pytest.approx(max(point.value for point in history), abs=1e-6)
    assert (decision.images, decision.left_out) == (2_000 // 12, 0)
    assert aliases() == {"champion": versions.good}
    assert tags(versions.good)["champion_version"] == ""


def test_a_better_version_is_promoted_and_the_former_champion_stays_findable(versions):
    set_champion(versions.fair)
    decision = promote("m", versions.good)
    assert decision.decision == "promoted" and decision.accuracy > decision.champion_accuracy + 0.005
    assert aliases() == {"champion": versions.good, "previous": versions.fair}
    assert str(decision) == (
        f"version {versions.good} is promoted: it is right on {decision.accuracy:.1%} of {decision.images} images, "
        f"version {versions.fair} on {decision.champion_accuracy:.1%}, and the gate asks for 0.5 points more."
    )


def test_a_worse_version_is_refused_and_the_reasons_are_on_it(versions):
    set_champion(versions.good)
    decision = promote("m", versions.poor)
    assert decision.decision == "refused"
    assert aliases() == {"champion": versions.good}
    recorded = tags(versions.poor)
    assert (recorded["decision"], recorded["reason"]) == ("refused", decision.reason)
    assert float(recorded["accuracy"]) == decision.accuracy < decision.champion_accuracy
    assert float(recorded["champion_accuracy"]) == decision.champion_accuracy
    assert recorded["champion_version"] == versions.good
    assert (recorded["images"], recorded["images_digest"]) == (str(decision.images), decision.images_digest)
    assert recorded["left_out"] == str(decision.left_out)
    assert datetime.now(UTC) - datetime.fromisoformat(recorded["decided_at"]) < timedelta(minutes=5)
    assert tags(versions.good) == {}


def test_the_gain_asked_for_is_enough_and_a_little_less_is_not(versions):
    set_champion(versions.fair)
    refused = promote("m", versions.good, min_gain=0.99)
    gain = refused.accuracy - refused.champion_accuracy
    assert refused.decision == "refused" and gain > 0
    assert promote("m", versions.good, min_gain=gain + 1e-6).decision == "refused"
    assert promote("m", versions.good, min_gain=round(gain, 12)).decision == "promoted"


def test_both_models_are_shown_the_same_images(versions, monkeypatch):
    shown, accuracy = [], registry._accuracy
    monkeypatch.setattr(registry, "_accuracy", lambda version, split: shown.append(split) or accuracy(version, split))
    set_champion(versions.fair)
    first, again = promote("m", versions.good, min_gain=0.99), promote("m", versions.good, min_gain=0.99)
    assert len(shown) == 4 and shown[0] is shown[1]
    assert first == again


def version_of_a_run(config, number=1, **replaced):
    """A version as the gate sees it, from a run that logged its configuration, and the images it would have seen."""
    data = load_data(config)
    with mlflow.start_run(tags={"data_digest": data.digest} | replaced) as run:
        mlflow.log_params(config.model_dump())
    return SimpleNamespace(name="m", version=number, run_id=run.info.run_id), content(data.train)


def content(split):
    return {image.tobytes() for image in split.images.numpy()}


def test_the_gate_shows_no_image_that_one_of_the_models_was_trained_on(home):
    connect("gate")
    smaller, seen_by_smaller = version_of_a_run(TrainConfig(train_images=4_000, seed=0), 1)
    larger, seen_by_larger = version_of_a_run(TrainConfig(train_images=6_000, seed=1), 2)
    split, left_out = registry._unseen([smaller, larger])
    assert 100 < len(split.images) == len(split.labels) == 6_000 // 12 - left_out < 6_000 // 12
    assert not content(split) & (seen_by_smaller | seen_by_larger)


def test_promoting_the_champion_again_changes_nothing(versions):
    set_champion(versions.fair)
    promote("m", versions.good)
    before = aliases(), tags(versions.good)
    assert promote("m", versions.good).decision == "unchanged"
    assert (aliases(), tags(versions.good)) == before


def test_a_call_that_dies_before_the_alias_moves_can_be_repeated(versions, monkeypatch):
    set_champion(versions.fair)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_move", lambda champion, candidate: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            promote("m", versions.good)
    assert aliases() == {"champion": versions.fair}
    assert promote("m", versions.good).decision == "promoted"
    assert aliases() == {"champion": versions.good, "previous": versions.fair}


def test_a_version_that_was_rolled_back_stays_out_until_its_tag_is_removed(versions):
    client = MlflowClient()
    set_champion(versions.fair)
    promote("m", versions.good)
    client.set_registered_model_alias("m", "champion", aliases()["previous"])
    client.set_model_version_tag("m", versions.good, "rolled_back", "the drill")
    decision = promote("m", versions.good)
    assert (decision.decision, decision.reason) == ("refused", "it was rolled back (the drill)")
    assert aliases()["champion"] == versions.fair
    client.delete_model_version_tag("m", versions.good, "rolled_back")
    assert promote("m", versions.good).decision == "promoted"
    assert aliases() == {"champion": versions.good, "previous": versions.fair}


def test_a_champion_that_changes_meanwhile_is_judged_anew(versions, monkeypatch):
    accuracy = registry._accuracy

    def somebody_else_is_faster(version, split):
        set_champion(versions.good)
        return accuracy(version, split)

    monkeypatch.setattr(registry, "_accuracy", somebody_else_is_faster)
    set_champion(versions.poor)
    decision = promote("m", versions.fair)
    assert (decision.decision, decision.champion_version) == ("refused", versions.good)
    assert aliases() == {"champion": versions.good}


def test_a_champion_that_changes_while_the_reasons_are_recorded_stays(versions, monkeypatch):
    record = registry._record

    def somebody_else_is_faster(candidate, decision):
        record(candidate, decision)
        set_champion(versions.good)

    monkeypatch.setattr(registry, "_record", somebody_else_is_faster)
    set_champion(versions.poor)
    decision = promote("m", versions.fair)
    assert (decision.decision, decision.champion_version) == ("refused", versions.good)
    assert aliases() == {"champion": versions.good} and tags(versions.fair)["decision"] == "refused"


def test_a_version_that_is_overtaken_in_the_last_moment_says_so(versions, monkeypatch):
    move = registry._move

    def then_somebody_else(champion, candidate):
        move(champion, candidate)
        set_champion(versions.fair)

    monkeypatch.setattr(registry, "_move", then_somebody_else)
    decision = promote("m", versions.good)
    assert decision.decision == tags(versions.good)["decision"] == "overtaken"
    assert f"version {versions.fair} became the champion" in str(decision)
    assert tags(versions.good)["accuracy"] == str(decision.accuracy)


@pytest.mark.parametrize(
    ("name", "number", "sentence"),
    [
        ("nobody", 1, "the registry has no model 'nobody': choose from m."),
        ("a/b", 1, "the registry has no model 'a/b': choose from m."),
        ("m", 99, "model 'm' has no version 99: choose from 1, 2, 3."),
        ("m", "last", "model 'm' has no version last: choose from 1, 2, 3."),
    ],
)
def test_a_missing_model_or_version_is_one_sentence(versions, name, number, sentence):
    with pytest.raises(RegistryError) as error:
        promote(name, number)
    assert str(error.value) == sentence


@pytest.mark.parametrize("gain", [-0.1, 1.5, float("nan"), "a", None])
def test_a_gain_that_is_no_share_is_refused(home, gain):
    with pytest.raises(RegistryError, match="it must be a share of images from 0 to 1"):
        promote("m", 1, gain)


def test_a_name_that_no_model_can_have_is_one_sentence(home):
    with pytest.raises(RegistryError, match="'a/b' can't be the name of a model"):
        first_champion("a/b", CONFIGS["poor"])


def test_a_version_that_is_no_classifier_is_one_sentence(versions):
    run_id = MlflowClient().get_model_version("m", versions.good).run_id
    network = mlflow.register_model(f"runs:/{run_id}/best_model", "m").version
    with pytest.raises(RegistryError, match=f"version {network} of 'm' can't be loaded or is no classifier") as error:
        promote("m", network)
    assert "\n" not in str(error.value) and tags(network) == {}


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), ValueError(), AttributeError("no label")])
def test_a_version_that_fails_while_it_predicts_is_one_sentence(versions, monkeypatch, error):
    monkeypatch.setattr(mlflow.pyfunc.PyFuncModel, "predict", lambda *arguments: raising(error))
    with pytest.raises(RegistryError, match="is no classifier of raw images") as caught:
        promote("m", versions.good)
    reason = str(error).split("\n")[0] or type(error).__name__
    assert f"({reason})" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [mlflow.MlflowException("API request failed"), requests.ConnectionError("refused")])
def test_a_store_that_fails_is_not_taken_for_a_bad_model(versions, monkeypatch, error):
    monkeypatch.setattr(mlflow.pyfunc, "load_model", lambda *arguments: raising(error))
    with pytest.raises(type(error)) as caught:
        promote("m", versions.good)
    assert caught.value is error and tags(versions.good) == {}


def test_an_empty_registry_says_what_to_do(home):
    with pytest.raises(RegistryError, match=r"^the registry has no model 'm': register one\.$"):
        promote("m", 1)
    assert find_champion("m") is None


def test_a_version_that_no_training_run_made_is_refused_with_what_to_do(versions):
    with mlflow.start_run() as run:
        pass
    version = MlflowClient().create_model_version("m", "runs:/nothing", run.info.run_id).version
    with pytest.raises(RegistryError, match=r"comes from no training run, .* register a model that was logged in"):
        promote("m", version)
    assert tags(version) == {}


def test_a_version_trained_on_other_data_is_not_judged_here(home):
    connect("gate")
    version, _ = version_of_a_run(TrainConfig(train_images=500), data_digest="0123")
    with pytest.raises(
        RegistryError, match=r"trained on other data \(digest 0123\) than there is here \(fashion-mnist"
    ):
        registry._unseen([version])


def test_the_first_champion_is_made_once_and_answers_by_its_alias(home, monkeypatch):
    made = first_champion("own", CONFIGS["good"])
    assert made.aliases == ["champion"] and made.tags["decision"] == "promoted"
    assert mlflow.get_run(made.run_id).info.status == "FINISHED"
    data = load_data(CONFIGS["good"])
    labels = mlflow.pyfunc.load_model("models:/own@champion").predict(raw_images(data.validation)).label
    right = (labels == [CLASSES[label] for label in data.validation.labels]).mean()
    assert right == float(made.tags["accuracy"]) > 0.5
    monkeypatch.setattr(registry, "train_classifier", lambda config: 1 / 0)
    assert first_champion("own", CONFIGS["good"]).version == made.version
