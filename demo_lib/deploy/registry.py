"""The model registry: a gate before the alias `champion`, and the reasons on each version."""

import io
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import CLASSES, FashionData, load_data
from demo_lib.deploy.packaging import log_classifier, raw_images, reason
from demo_lib.recipe import train
from demo_lib.store import open_store

import mlflow
from mlflow import MlflowClient, MlflowException
from mlflow.entities.model_registry import ModelVersion
from mlflow.models.model import ModelInfo


@dataclass(frozen=True)
class Decision:
    """What became of a version at the gate; accuracies are shares of the `images` that both models were shown."""

    version: str
    decision: Literal["promoted", "refused", "unchanged"]
    reason: str
    accuracy: float | None = None
    champion_version: str | None = None
    champion_accuracy: float | None = None
    images: int = 0

    def __str__(self) -> str:
        return f"version {self.version} is {self.decision}: {self.reason}."


def train_classifier(config: TrainConfig, experiment: str = "train") -> ModelInfo:
    """Train as `recipe.train` does, package the best network in the same run, and return the classifier."""
    run_id = train(config, experiment).info.run_id
    with mlflow.start_run(run_id=run_id):
        return log_classifier(f"runs:/{run_id}/best_model")


def first_champion(model_name: str, config: TrainConfig) -> ModelVersion:
    """Return the champion; if there is none, train (in the experiment `train`), package, register and promote one."""
    open_store()
    if find_champion(model_name) is None:
        classifier = train_classifier(config)
        with redirect_stderr(io.StringIO()):  # MLflow announces each registration there
            version = mlflow.register_model(classifier.model_uri, model_name)
        promote(model_name, version.version)
    return find_champion(model_name)


def promote(model_name: str, version: int | str, min_gain: float = 0.005) -> Decision:
    """Make the version the champion if it is right on at least `min_gain` (a share) more images than the champion is.

    Both are shown the gate split, on which nothing is trained or chosen. The first champion needs no gain; a version
    with the tag `rolled_back` is refused. The former champion gets the alias `previous`, the version tags that say why.
    The registry can't move an alias on condition, so let one job at a time promote. A version that is not there, no
    classifier, or not trained on the data here is a DemoError.
    """
    open_store()
    client = MlflowClient()
    try:
        candidate = client.get_model_version(model_name, str(version))
    except MlflowException as error:
        why = f"version {version} of {model_name!r} can't be judged ({reason(error)})"
        raise DemoError(f"{why}: name one that is registered.") from None
    champion = find_champion(model_name)
    decision = _judge(candidate, champion, min_gain)
    if decision.decision == "unchanged":
        return decision
    tags = vars(decision) | {"decided_at": datetime.now(UTC).isoformat(timespec="seconds")}
    for key, value in tags.items():  # first, so that a call that dies before the alias moves can be repeated whole
        client.set_model_version_tag(model_name, candidate.version, key, "" if value is None else value)
    if decision.decision == "promoted":
        if champion is None:
            client.delete_registered_model_alias(model_name, "previous")  # it may be left from a deleted champion
        else:
            client.set_registered_model_alias(model_name, "previous", champion.version)
        client.set_registered_model_alias(model_name, "champion", candidate.version)
    return decision


def find_champion(model_name: str) -> ModelVersion | None:
    """Return the version that has the alias `champion`, None if there is none or no such model for you."""
    try:
        return MlflowClient().get_model_version_by_alias(model_name, "champion")
    except MlflowException as error:
        # Without the alias a parameter is invalid; a server with accounts refuses to show a model that is not there.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"):
            raise
        return None


def _judge(candidate: ModelVersion, champion: ModelVersion | None, min_gain: float) -> Decision:
    number, against = str(candidate.version), champion and str(champion.version)  # SQLite gives numbers, a server text
    if number == against:
        return Decision(number, "unchanged", "it is the champion already")
    if blame := candidate.tags.get("rolled_back"):
        return Decision(number, "refused", f"it was rolled back ({blame})", champion_version=against)
    data = load_data()
    accuracy = _accuracy(candidate, data)
    former = champion and _accuracy(champion, data)
    share = f"it is right on {accuracy:.1%} of {len(data.gate):,} images"
    if champion is None:
        decision, why = "promoted", f"{share}, and there was no champion"
    else:
        passes = round(accuracy - former - min_gain, 9) >= 0  # 0.85 - 0.84 is a little more than 0.01
        decision = "promoted" if passes else "refused"
        why = f"{share}, version {against} on {former:.1%}, and the gate asks for {100 * min_gain:g} points more"
    return Decision(number, decision, why, accuracy, against, former, len(data.gate))


def _accuracy(version: ModelVersion, data: FashionData) -> float:
    digest = None
    with suppress(MlflowException):  # its run is gone
        digest = version.run_id and MlflowClient().get_run(version.run_id).data.tags.get("data_digest")
    if digest != data.digest:  # it may have seen the gate's images
        why = f"was trained on other data (digest {digest or 'unknown'}) than {data.name} here (digest {data.digest})"
        raise DemoError(f"version {version.version} of {version.name!r} {why}: promote it where its data is.")
    try:
        model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
        labels = model.predict(raw_images(data.gate))["label"]
    except Exception as error:  # the model's own code may raise anything
        why = f"can't be judged ({reason(error)}): correct that, or register what `log_classifier` made"
        raise DemoError(f"version {version.version} of {version.name!r} {why}.") from None
    return float((labels == [CLASSES[label] for label in data.gate.labels]).mean())
