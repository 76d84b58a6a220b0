"""The model registry: a gate before the alias `champion`, and the reasons on each version."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from numbers import Real
from typing import Literal

from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import CLASSES, FashionData, load_data
from demo_lib.deploy.packaging import MISSING, is_of_the_store, log_classifier, raw_images, reason
from demo_lib.recipe import train
from demo_lib.store import open_store

import mlflow
from mlflow import MlflowClient, MlflowException
from mlflow.entities.model_registry import ModelVersion
from mlflow.models.model import ModelInfo


@dataclass(frozen=True)
class Decision:
    """What became of a version at the gate; accuracies are shares of the `images` that both models were shown.

    `overtaken` means that somebody else's version became the champion in the same moment.
    """

    version: str
    decision: Literal["promoted", "refused", "unchanged", "overtaken"]
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
    """Return the champion; if there is none, train, package, register and promote one first.

    That makes `train` the active experiment: connect to your own afterwards.
    """
    open_store()
    if (champion := find_champion(model_name)) is not None:
        return champion
    classifier = train_classifier(config)
    with redirect_stderr(io.StringIO()):  # MLflow announces each registration there
        version = mlflow.register_model(classifier.model_uri, model_name)
    promote(model_name, version.version)
    return find_champion(model_name)


def promote(model_name: str, version: int | str, min_gain: float = 0.005) -> Decision:
    """Make the version the champion if it is right on at least `min_gain` (a share) more images than the champion is.

    Both are shown the gate split, on which nothing is trained or chosen. The first champion needs no gain; a version
    with the tag `rolled_back` is refused. The former champion gets the alias `previous`, the version tags that say why.
    The registry can't move an alias on condition, so of two at once the last wins, and the other is told: to rule that
    out, let one job at a time promote.

    Raises:
        DemoError: the version is not there, no classifier, or not trained on the data here; or a bad `min_gain`.
    """
    if not (isinstance(min_gain, Real) and 0 <= min_gain <= 1):
        raise DemoError(f"min_gain = {min_gain!r} is not allowed: it must be a share of images from 0 to 1.")
    open_store()
    candidate = _find_version(model_name, version)
    while True:
        champion = find_champion(model_name)
        decision = _judge(candidate, champion, min_gain)
        if decision.decision == "unchanged":
            return decision
        _record(candidate, decision)  # first, so that a call that dies before the alias moves can be repeated whole
        if _number(find_champion(model_name)) == _number(champion):
            break
    if decision.decision == "promoted":
        _move(champion, candidate)
        if (now := _number(find_champion(model_name))) != decision.version:
            why = f"version {now} became the champion in the same moment"
            decision = replace(decision, decision="overtaken", reason=why)
            _record(candidate, decision)
    return decision


def find_champion(model_name: str) -> ModelVersion | None:
    """Return the version that has the alias `champion`, None if there is none or no such model for you."""
    try:
        number = MlflowClient().get_registered_model(model_name).aliases.get("champion")
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise DemoError(f"{model_name!r} can't be the name of a model: {error.message}") from None
        # A server with accounts also refuses to show a model that is not there.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
            raise
        return None
    return None if number is None else MlflowClient().get_model_version(model_name, number)


def _find_version(model_name: str, version: int | str) -> ModelVersion:
    client = MlflowClient()
    try:
        return client.get_model_version(model_name, str(version))
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
    there = [model.name for model in client.search_registered_models()]
    missing = f"the registry has no model {model_name!r}"
    if model_name in there:
        there = sorted(int(found.version) for found in client.search_model_versions(f"name = '{model_name}'"))
        missing = f"model {model_name!r} has no version {version}"
    advice = f"choose from {', '.join(map(str, there))}" if there else "register one"
    raise DemoError(f"{missing}: {advice}.")


def _number(version: ModelVersion | None) -> str | None:
    """Return the version's number as text: SQLite gives a number, a server gives text."""
    return None if version is None else str(version.version)


def _judge(candidate: ModelVersion, champion: ModelVersion | None, min_gain: float) -> Decision:
    number, against = _number(candidate), _number(champion)
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


def _refuse_unknown(version: ModelVersion, data: FashionData) -> None:
    """The images of the gate are unseen by what was trained on the same data, split in the same way."""
    digest = version.run_id and MlflowClient().get_run(version.run_id).data.tags.get("data_digest")
    if not digest:
        why = "comes from no training run, so it may have seen any image: register a model that was logged in one"
    elif digest != data.digest:
        todo = "promote it where its data is, or take another model name"
        why = f"was trained on other data (digest {digest}) than {data.name} here (digest {data.digest}): {todo}"
    else:
        return
    raise DemoError(f"version {version.version} of {version.name!r} {why}.")


def _accuracy(version: ModelVersion, data: FashionData) -> float:
    _refuse_unknown(version, data)
    try:
        model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
        found = model.predict(raw_images(data.gate))["label"]
        return float((found == [CLASSES[label] for label in data.gate.labels]).mean())
    except Exception as error:  # the model's own code may raise anything
        if is_of_the_store(error):
            raise
        why = f"can't be loaded or is no classifier of raw images ({reason(error)})"
        is_champion = "champion" in version.aliases
        todo = "move the alias `champion` away from it" if is_champion else "register what `log_classifier` made"
        raise DemoError(f"version {version.version} of {version.name!r} {why}: {todo}.") from None


def _record(candidate: ModelVersion, decision: Decision) -> None:
    """Write the decision into the version's tags, over that of an earlier call."""
    tags = vars(decision) | {"decided_at": datetime.now(UTC).isoformat(timespec="seconds")}
    del tags["version"]
    for key, value in tags.items():
        MlflowClient().set_model_version_tag(candidate.name, candidate.version, key, "" if value is None else value)


def _move(champion: ModelVersion | None, candidate: ModelVersion) -> None:
    if champion is None and "previous" in candidate.aliases:
        MlflowClient().delete_registered_model_alias(candidate.name, "previous")  # a roll back would lead to itself
    set_alias = MlflowClient().set_registered_model_alias
    for version, alias in ((champion, "previous"), (candidate, "champion")):
        if version is not None:
            try:
                set_alias(version.name, alias, version.version)
            except MlflowException:  # of two who make a new alias at once, one is told so, the first time only
                set_alias(version.name, alias, version.version)
