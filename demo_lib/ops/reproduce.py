"""Two runs compared: a recorded one and its training made again, or a run and its copy in another store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import find_data
from demo_lib.recipe import train
from demo_lib.runs import config_of, find_run, histories
from demo_lib.store import open_store
from demo_lib.tracking import PACKAGES, provenance
from demo_lib.training import pick_device

import pandas as pd
import torch
from mlflow.entities import Metric, Run
from mlflow.environment_variables import MLFLOW_RUN_ID
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

LABELS = {MLFLOW_GIT_COMMIT: "commit", "python_version": "Python"}
LABELS |= {f"{package}_version": package for package in PACKAGES}
LABELS |= {"data_digest": "digest of the data", "device": "device", "cpu_threads": "CPU threads"}
METRICS = {"train_loss", "learning_rate", "val_loss", "val_accuracy", "test_loss", "test_accuracy"}  # of a training
Point = tuple[int, str, int]  # step, metric, and which of the values logged at that step
Contents = tuple[Run, list[Metric], str | Path]


@dataclass(frozen=True)
class Reproduction:
    """The run of a training made again, what was compared, and the first difference, None if there is none."""

    run: Run
    values: int
    metrics: list[str]
    left_out: list[str]
    difference: str | None

    def __str__(self) -> str:
        text = f"the same: all {self.values} values of {', '.join(self.metrics)} are equal to the last bit"
        if self.difference:
            text = f"NOT the same: {self.difference}"
        return text + (f"\nnot compared: {', '.join(self.left_out)}" if self.left_out else "")


def reproduce(run_id: str, experiment: str = "reproduce") -> Reproduction:
    """Train with the run's configuration in a new run, tagged `reproduces`, and compare; the id may be a prefix.

    Prints first what differs here. Takes as many CPU threads as the run had, and its device if this machine has it.

    Raises:
        DemoError: the run is unknown, or no training with a whole `TrainConfig`, or `MLFLOW_RUN_ID` is set.
    """
    if MLFLOW_RUN_ID.get():
        raise DemoError("MLFLOW_RUN_ID is set, and the training needs a run of its own: unset MLFLOW_RUN_ID.")
    open_store()
    original = find_run(run_id)
    config = _on_its_device(original)
    _in_common(original, METRICS)
    print("\n".join(differences(original)) or "nothing differs here: code, packages, data and device are the same")
    before = torch.get_num_threads()
    torch.set_num_threads(_threads(original.data.tags.get("cpu_threads", "")))
    try:
        return compare(original, train(config, experiment, {"reproduces": original.info.run_id}))
    finally:
        torch.set_num_threads(before)


def differences(original: Run) -> list[str]:
    """Say in one line each what differs here from where the run was made: code, packages, data, device, threads."""
    then = original.data.tags
    here = provenance(config=_on_its_device(original)) | {"data_digest": find_data().digest}
    other = [tag for tag in LABELS if then.get(tag) != here.get(tag)]
    lines = [f"{LABELS[tag]}: {then.get(tag, 'not recorded')} then, {here.get(tag, 'unknown')} here" for tag in other]
    if then.get("git_dirty") == "true":
        lines.append("uncommitted changes then: the commit alone does not bring back the code that ran")
    if here.get("git_dirty") == "true":
        lines.append("uncommitted changes here: what runs now is not the commit alone")
    return lines


def compare(original: Run, again: Run) -> Reproduction:
    """Compare the metrics that both runs have, but for times and the machine's load, value by value.

    A run that did not finish, such as a pruned trial, is compared as far as it came.

    Raises:
        DemoError: the runs have no metric in common.
    """
    mine, names = ({*run.data.metrics} - {"fit_seconds"} for run in (original, again))
    metrics = _in_common(original, names)
    then, now = (_points(run, metrics) for run in (original, again))
    points = sorted(then.keys() | now.keys() if original.info.status == "FINISHED" else then)
    different = [point for point in points if repr(then.get(point)) != repr(now.get(point))]  # NaN is equal to itself
    difference = None
    if different:
        first = _text(different[0], then.get(different[0]), now.get(different[0]))
        difference = f"{len(different)} of {len(points)} values differ; first {first}"
    return Reproduction(again, len(points), metrics, sorted(mine - names), difference)


def arrived(before: Contents, after: Contents) -> pd.DataFrame:
    """Count what the first run has, and how much of it the second has just as it was: one row a kind.

    Each run comes with its metric values and the folder of its files.
    """
    first, second = _things(*before), _things(*after)
    counts = {kind: (len(things), len(things & second[kind])) for kind, things in first.items()}
    return pd.DataFrame.from_dict(counts, "index", columns=["before", "arrived"])


def _things(run: Run, points: list[Metric], folder: str | Path) -> dict[str, set]:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {
        "run id": {run.info.run_id},
        "start and end": {("start", run.info.start_time), ("end", run.info.end_time)},
        "parameters": set(run.data.params.items()),
        "metric values": {(point.key, point.step, point.timestamp, point.value) for point in points},
        "tags": set(run.data.tags.items()),
        "datasets": {(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs},
        "files": {(path.relative_to(folder), path.read_bytes()) for path in files},
        "models": {each.model_id for each in run.outputs.model_outputs} if run.outputs else set(),
    }


def _in_common(run: Run, names: set[str]) -> list[str]:
    """Return those of the metrics that the run has, in order."""
    metrics = sorted(name for name in run.data.metrics.keys() & names if not name.startswith("system/"))
    if not metrics:
        missing = f"none of the metrics of a training ({', '.join(sorted(names))})"
        raise DemoError(f"run {run.info.run_id} ({run.info.run_name}) has {missing}: choose another run.")
    return metrics


def _points(run: Run, metrics: list[str]) -> dict[Point, float]:
    history = histories(run.info.run_id, metrics)
    nth = history.groupby(["metric", "step"]).cumcount()
    return dict(zip(zip(history.step, history.metric, nth, strict=True), history.value, strict=True))


def _text(point: Point, then: float | None, now: float | None) -> str:
    step, metric, _ = point
    before, after = ("none" if value is None else f"{value:.6g}" for value in (then, now))
    text = f"{metric} at step {step}: {before} then, {after} now"
    # A difference in the last bits is in no digit above.
    return text if pd.isna(then) or pd.isna(now) else f"{text}, {abs(now - then):.1g} apart"


def _on_its_device(original: Run) -> TrainConfig:
    """Return the run's configuration with the device that it ran on, or `auto` if this machine lacks the device."""
    config = config_of(original)
    try:
        recorded = TrainConfig(**config.model_dump() | {"device": original.data.tags.get("device", config.device)})
        pick_device(recorded)
    except DemoError:
        return config.model_copy(update={"device": "auto"})
    return recorded


def _threads(tag: str) -> int:
    """Return the run's number of CPU threads, as sums in another order differ in their last bits; else that of here."""
    return int(tag) if tag.isdecimal() and 0 < int(tag) <= 256 else torch.get_num_threads()
