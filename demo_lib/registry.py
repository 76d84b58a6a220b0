"""The model registry: a gate before the alias `champion`, and the reasons on each version."""

from __future__ import annotations

import hashlib
import io
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from numbers import Real
from typing import Literal

from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import CLASSES, Split, load_data
from demo_lib.packaging import MISSING, is_of_the_store, log_classifier, raw_images, reason
from demo_lib.tracking import open_store, train

import mlflow
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.models.model import ModelInfo

CHAMPION, PREVIOUS = "champion", "previous"
ROLLED_BACK = "rolled_back"  # tag of a version that must not come back by itself


class RegistryError(DemoError):
    """A model or version that the registry doesn't have, or one that the gate can't judge."""


@dataclass(frozen=True)
class Decision:
    """What became of a version at the gate; accuracies are shares of the `images` that both models were shown.

    `left_out` counts the other validation images, on which one of the two was trained. `overtaken` means that somebody
    else's version became the champion in the same moment.
    """

    version: str
    decision: Literal["promoted", "refused", "unchanged", "overtaken"]
    reason: str
    accuracy: float | None = None
    champion_version: str | None = None
    champion_accuracy: float | None = None
    images: int = 0
    left_out: int = 0
    images_digest: str | None = None

    def __str__(self) -> str:
        return f"version {self.version} is {self.decision}: {self.reason}."


def train_classifier(config: TrainConfig, experiment: str = "train") -> ModelInfo:
    """Train in the experiment as `tracking.train` does, package the best network in the same run, and return it."""
    run_id = train(config, experiment).info.run_id
    with mlflow.start_run(run_id=run_id):
        return log_classifier(f"runs:/{run_id}/best_model")


def first_champion(model_name: str, config: TrainConfig) -> ModelVersion:
    """Return the champion; where there is none, train, package, register and promote one first.

    A training makes `train` the active experiment: connect to your own after this call.
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

    Both are shown the same validation images, none of which either was trained on. The first champion needs no gain; a
    version with the tag `rolled_back` is refused. The former champion gets the alias `previous`. Why it was decided so
    is in the version's tags. Called again for the champion, it changes nothing.

    The registry can't move an alias on condition, so the last of two people wins. This looks at the champion again
    right before it moves the alias, judges anew if that has changed, and looks once more afterwards. What stays open is
    the time of one request; to close it, let one job at a time promote.

    Raises:
        RegistryError: there is no such model or version, no training run to judge it by, or other data here; or the
            version is no classifier, or `min_gain` out of range.
    """
    if not (isinstance(min_gain, Real) and 0 <= min_gain <= 1):
        raise RegistryError(f"min_gain = {min_gain!r} is not allowed: it must be a share of images from 0 to 1.")
    open_store()
    candidate = find_version(model_name, version)
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
    client = MlflowClient()
    try:
        number = client.get_registered_model(model_name).aliases.get(CHAMPION)
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise RegistryError(f"{model_name!r} can't be the name of a model: {error.message}") from None
        # A server with accounts also refuses to show a model that is not there.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
            raise
        return None
    return None if number is None else client.get_model_version(model_name, number)


def find_version(model_name: str, version: int | str) -> ModelVersion:
    """Return this version of the registered model.

    Raises:
        RegistryError: there is no such model or version; what there is, is named.
    """
    client = MlflowClient()
    try:
        return client.get_model_version(model_name, str(version))
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
    models = [model.name for model in client.search_registered_models()]
    if model_name not in models:
        raise RegistryError(f"the registry has no model {model_name!r}: {_choice(models, 'register one')}.")
    numbers = sorted(int(found.version) for found in client.search_model_versions(f"name = '{model_name}'"))
    raise RegistryError(f"model {model_name!r} has no version {version}: {_choice(numbers, 'register one')}.")


def _choice(there: list, otherwise: str) -> str:
    return f"choose from {', '.join(map(str, there))}" if there else otherwise


def _number(version: ModelVersion | None) -> str | None:
    """Return the version's number as text: SQLite gives a number, a server gives text."""
    return None if version is None else str(version.version)


def _judge(candidate: ModelVersion, champion: ModelVersion | None, min_gain: float) -> Decision:
    number, against = _number(candidate), _number(champion)
    if number == against:
        return Decision(number, "unchanged", "it is the champion already")
    split, left_out = _unseen([candidate, champion] if champion else [candidate])
    accuracy, former = _accuracy(candidate, split), champion and _accuracy(champion, split)
    share = f"it is right on {accuracy:.1%} of {len(split):,} images"
    if blame := candidate.tags.get(ROLLED_BACK):
        decision, why = "refused", f"it was rolled back ({blame})"
    elif champion is None:
        decision, why = "promoted", f"{share}, and there was no champion"
    else:
        passes = round(accuracy - former - min_gain, 9) >= 0  # 0.85 - 0.84 is a little more than 0.01
        decision = "promoted" if passes else "refused"
        why = f"{share}, version {against} on {former:.1%}, and the gate asks for {100 * min_gain:g} points more"
    return Decision(number, decision, why, accuracy, against, former, len(split), left_out, _digest(split))


def _unseen(versions: list[ModelVersion]) -> tuple[Split, int]:
    """Return the validation images of the version with most training images that no other was trained on.

    The number beside them says how many were left out.

    Each configuration has a split of its own, and the validation images of one are training images of another.
    """
    runs = {version.version: _training_run(version) for version in versions}
    configs = [TrainConfig.from_params(run.data.params) for run in runs.values()]
    *others, largest = sorted(configs, key=lambda config: config.train_images)
    data = load_data(largest)
    for number, run in runs.items():
        if (digest := run.data.tags.get("data_digest")) != data.digest:
            raise RegistryError(
                f"version {number} of {versions[0].name!r} was trained on other data (digest {digest}) than there is "
                f"here ({data.name}, digest {data.digest}): promote it where its data is, or take another model name."
            )
    seen = {image.tobytes() for config in others for image in load_data(config).train.images.numpy()}
    keep = [place for place, image in enumerate(data.validation.images.numpy()) if image.tobytes() not in seen]
    return Split(data.validation.images[keep], data.validation.labels[keep]), len(data.validation) - len(keep)


def _training_run(version: ModelVersion) -> Run:
    run = MlflowClient().get_run(version.run_id) if version.run_id else None
    if run is None or not TrainConfig.model_fields.keys() <= run.data.params.keys():
        raise RegistryError(
            f"version {version.version} of {version.name!r} comes from no training run, so nobody knows which images "
            "it has seen: register a model that was logged in the run that trained it."
        )
    return run


def _accuracy(version: ModelVersion, split: Split) -> float:
    labels = [CLASSES[label] for label in split.labels]
    try:
        model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
        return float((model.predict(raw_images(split))["label"] == labels).mean())
    except Exception as error:  # the model's own code may raise anything
        if is_of_the_store(error):
            raise
        raise RegistryError(
            f"version {version.version} of {version.name!r} can't be loaded or is no classifier of raw images "
            f"({reason(error)}): register a model that `packaging.log_classifier` made."
        ) from None


def _digest(split: Split) -> str:
    content = split.images.numpy().tobytes() + split.labels.numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


def _record(candidate: ModelVersion, decision: Decision) -> None:
    """Write the decision into the version's tags, over that of an earlier call."""
    client = MlflowClient()
    tags = vars(decision) | {"decided_at": datetime.now(UTC).isoformat(timespec="seconds")}
    del tags["version"]
    for key, value in tags.items():
        client.set_model_version_tag(candidate.name, candidate.version, key, "" if value is None else value)


def _move(champion: ModelVersion | None, candidate: ModelVersion) -> None:
    if champion is not None:
        _set_alias(champion, PREVIOUS)
    _set_alias(candidate, CHAMPION)


def _set_alias(version: ModelVersion, alias: str) -> None:
    """Set the alias; of two who make a new one at once, a database answers one with an error, the first time only."""
    client = MlflowClient()
    try:
        client.set_registered_model_alias(version.name, alias, version.version)
    except MlflowException:
        client.set_registered_model_alias(version.name, alias, version.version)
