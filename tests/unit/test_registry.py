"""The registry: the gate before the champion, what it records, the way back, and what the user is told."""

import os
import shutil
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import CLASSES, find_data, load_data
from demo_lib.deploy import registry
from demo_lib.deploy.packaging import raw_images
from demo_lib.deploy.registry import find_champion, first_champion, promote, train_classifier
from demo_lib.store import open_store

import mlflow
import pytest
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


def set_champion(version):
    MlflowClient().set_registered_model_alias("m", "champion", version)


def test_the_first_champion_needs_no_gain_and_is_right_as_often_as_its_network(versions, trained):
    decision = promote("m", versions.good)
    assert (decision.decision, decision.champion_version) == ("promoted", None)
    gate, network = load_data().gate, mlflow.pytorch.load_model(f"runs:/{trained[1]['good'].run_id}/best_model")
    right = (network(gate.images / 255).argmax(1) == gate.labels).sum().item()
    assert (decision.accuracy, decision.images) == (right / len(gate), len(gate))
    assert aliases() == {"champion": versions.good}
    assert tags(versions.good)["champion_version"] == ""


def test_a_better_version_is_promoted_and_the_former_champion_stays_findable(versions):
    set_champion(versions.fair)
    decision = promote("m", versions.good)
    assert decision.decision == "promoted" and decision.accuracy > decision.champion_accuracy + 0.005
    assert aliases() == {"champion": versions.good, "previous": versions.fair}
    assert str(decision) == (
        f"version {versions.good} is promoted: it is right on {decision.accuracy:.1%} of {decision.images:,} images, "
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
    assert recorded["images"] == str(decision.images)
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
    monkeypatch.setattr(registry, "_accuracy", lambda version, data: shown.append(data.gate) or accuracy(version, data))
    set_champion(versions.fair)
    first, again = promote("m", versions.good, min_gain=0.99), promote("m", versions.good, min_gain=0.99)
    assert len(shown) == 4 and shown[0] is shown[1]
    assert content(shown[0]) == content(shown[2]) == content(load_data().gate)
    assert first == again


def content(split):
    return [image.tobytes() for image in split.images.numpy()]


@pytest.mark.parametrize("sample", [False, True])
def test_nobody_trains_or_chooses_on_the_images_of_the_gate(home, monkeypatch, tmp_path, sample):
    if sample:
        monkeypatch.setenv("DEMO_HOME", str(tmp_path))
        monkeypatch.setattr("demo_lib.data.DEBIAN", tmp_path / "none")
    gate = content(load_data().gate)
    assert len(gate) == len(find_data().train) // 12
    for size in (200, 4_000, 60_000):
        for seed in (0, 1, 7):
            data = load_data(TrainConfig(train_images=size, seed=seed))
            assert content(data.gate) == gate
            assert not {*gate} & {*content(data.train), *content(data.validation)}


def test_promoting_the_champion_again_changes_nothing(versions):
    set_champion(versions.fair)
    promote("m", versions.good)
    before = aliases(), tags(versions.good)
    assert promote("m", versions.good).decision == "unchanged"
    assert (aliases(), tags(versions.good)) == before


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


def test_a_call_that_dies_before_the_alias_moves_can_be_repeated(versions, monkeypatch):
    set_champion(versions.fair)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            promote("m", versions.good)
    assert aliases() == {"champion": versions.fair}
    assert promote("m", versions.good).decision == "promoted"
    assert aliases() == {"champion": versions.good, "previous": versions.fair}


def test_the_first_champion_has_no_previous_one(versions):
    MlflowClient().set_registered_model_alias("m", "previous", versions.good)
    promote("m", versions.good)
    assert aliases() == {"champion": versions.good}


@pytest.mark.parametrize("name, number", [("nobody", 1), ("a/b", 1), ("m", 99), ("m", "last")])
def test_a_missing_model_or_version_is_one_sentence(versions, name, number):
    with pytest.raises(
        DemoError, match=f"version {number} of '{name}' can't be judged .*: name one that is registered"
    ) as error:
        promote(name, number)
    assert "\n" not in str(error.value)
    assert find_champion(name) is None


def test_a_version_that_is_no_classifier_is_one_sentence(versions):
    run_id = MlflowClient().get_model_version("m", versions.good).run_id
    network = mlflow.register_model(f"runs:/{run_id}/best_model", "m").version
    sentence = f"^version {network} of 'm' can't be judged .*: correct that, or register what `log_classifier` made.$"
    with pytest.raises(DemoError, match=sentence):
        promote("m", network)
    assert tags(network) == {}
    set_champion(network)
    with pytest.raises(DemoError, match=sentence):
        promote("m", versions.good)


@pytest.mark.parametrize("role", ["candidate", "champion"])
@pytest.mark.parametrize("digest", ["0123", None])
def test_a_version_trained_on_other_or_unknown_data_is_not_judged_here(versions, role, digest):
    client = MlflowClient()
    run_id = client.get_model_version("m", versions.good).run_id
    client.set_tag(run_id, "data_digest", digest) if digest else client.delete_tag(run_id, "data_digest")
    set_champion(versions.good if role == "champion" else versions.fair)
    words = (
        rf"version {versions.good} of 'm' was trained on other data \(digest {digest or 'unknown'}\) than fashion-mnist"
    )
    with pytest.raises(DemoError, match=words):
        promote("m", versions.fair if role == "champion" else versions.good)
    assert tags(versions.fair) == tags(versions.good) == {}


def test_the_first_champion_is_made_once_and_answers_by_its_alias(home, monkeypatch):
    made = first_champion("own", CONFIGS["good"])
    assert made.aliases == ["champion"] and made.tags["decision"] == "promoted"
    assert mlflow.get_run(made.run_id).info.status == "FINISHED"
    gate = load_data().gate
    labels = mlflow.pyfunc.load_model("models:/own@champion").predict(raw_images(gate)).label
    right = (labels == [CLASSES[label] for label in gate.labels]).mean()
    assert right == float(made.tags["accuracy"]) > 0.5
    monkeypatch.setattr(registry, "train_classifier", lambda config: 1 / 0)
    assert first_champion("own", CONFIGS["good"]).version == made.version
