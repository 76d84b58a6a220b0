"""Two runs compared: a recorded one and its training made again, or a run and its copy in another store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo_lib.config import ConfigError, DemoError, TrainConfig
from demo_lib.data import find_data
from demo_lib.runs import config_of, find_run, histories
from demo_lib.tracking import PACKAGES, open_store, provenance, train
from demo_lib.training import pick_device

import pandas as pd
import torch
from mlflow.entities import Metric, Run
from mlflow.environment_variables import MLFLOW_RUN_ID
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

LABELS = {
    MLFLOW_GIT_COMMIT: "commit",
    "python_version": "Python",
    **{f"{package}_version": package for package in PACKAGES},
    "data_digest": "digest of the data",
    "device": "device",
    "cpu_threads": "CPU threads",
}
METRICS = {"train_loss", "learning_rate", "val_loss", "val_accuracy", "test_loss", "test_accuracy"}  # of a training
POINT = ["step", "metric", "nth"]
Contents = tuple[Run, list[Metric], Path]


class ReproduceError(DemoError):
    """A run has nothing that a training could be compared with, or no new run can be made."""


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
    """Train with the run's configuration in a new run of the experiment and compare; the id may be a prefix.

    Prints first what differs from here. Trains with as many CPU threads as the run had, and on its device if this
    machine has it. The new run has the tag `reproduces`.

    Raises:
        RunError: the run is unknown or didn't log a whole `TrainConfig`.
        ReproduceError: the run has logged none of the metrics that a training logs, or `MLFLOW_RUN_ID` is set.
    """
    if MLFLOW_RUN_ID.get():
        raise ReproduceError("MLFLOW_RUN_ID is set, and the training needs a run of its own: unset MLFLOW_RUN_ID.")
    open_store()
    original = find_run(run_id)
    config = _on_its_device(original)
    _in_common(original, METRICS)
    print("\n".join(differences(original)) or "nothing differs here: code, packages, data and device are the same")
    with _cpu_threads(original.data.tags.get("cpu_threads")):
        again = train(config, experiment, {"reproduces": original.info.run_id})
    return compare(original, again)


def differences(original: Run) -> list[str]:
    """Say in one line each what differs here from where the run was made: code, packages, data, device, threads."""
    then = original.data.tags
    here = provenance(config=_on_its_device(original)) | {"data_digest": find_data().digest}
    lines = [
        f"{label}: {then.get(tag, 'not recorded')} then, {here.get(tag, 'unknown')} here"
        for tag, label in LABELS.items()
        if then.get(tag) != here.get(tag)
    ]
    if then.get("git_dirty") == "true":
        lines.append("uncommitted changes then: the commit alone does not bring back the code that ran")
    if here.get("git_dirty") == "true":
        lines.append("uncommitted changes here: what runs now is not the commit alone")
    return lines


def compare(original: Run, again: Run) -> Reproduction:
    """Compare the metrics that both runs have, but for times and the machine's load, value by value.

    A run that did not finish, such as a pruned trial, is compared as far as it came.

    Raises:
        ReproduceError: the runs have no metric in common.
    """
    mine, names = ({*run.data.metrics} - {"fit_seconds"} for run in (original, again))
    metrics = _in_common(original, names)
    then, now = (_points(run, metrics) for run in (original, again))
    how = "outer" if original.info.status == "FINISHED" else "left"
    points = then.merge(now, how, on=POINT, suffixes=("_then", "_now"), indicator="found").sort_values(POINT)
    equal = (points.value_then == points.value_now) | (points.value_then.isna() & points.value_now.isna())
    different = points[(points.found != "both") | ~equal]
    difference = (
        None
        if different.empty
        else f"{len(different)} of {len(points)} values differ; first {_text(different.iloc[0])}"
    )
    return Reproduction(again, len(points), metrics, sorted(mine - names), difference)


def arrived(before: Contents, after: Contents) -> pd.DataFrame:
    """Count the things of each kind that the first run has, and those of them that the second has just as they were.

    Each run comes with its metric values and the folder of its files. Returns one row a kind, with the columns `before`
    and `arrived`.
    """
    first, second = _things(*before), _things(*after)
    counts = {kind: (len(things), len(things & second[kind])) for kind, things in first.items()}
    return pd.DataFrame.from_dict(counts, "index", columns=["before", "arrived"])


def _things(run: Run, points: list[Metric], folder: Path) -> dict[str, set]:
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
        raise ReproduceError(
            f"run {run.info.run_id} ({run.info.run_name}) has none of the metrics of a training "
            f"({', '.join(sorted(names))}): choose another run."
        )
    return metrics


def _points(run: Run, metrics: list[str]) -> pd.DataFrame:
    """Return step, metric, nth (of the values logged at the same step) and value."""
    history = histories(run.info.run_id, metrics)
    return history.assign(nth=history.groupby(["metric", "step"]).cumcount())[[*POINT, "value"]]


def _text(point: pd.Series) -> str:
    then = "none" if point.found == "right_only" else f"{point.value_then:.6g}"
    now = "none" if point.found == "left_only" else f"{point.value_now:.6g}"
    off = abs(point.value_now - point.value_then)  # a difference in the last bits is in no digit above
    text = f"{point.metric} at step {point.step}: {then} then, {now} now"
    return text if pd.isna(off) else f"{text}, {off:.1g} apart"


def _on_its_device(original: Run) -> TrainConfig:
    """Return the run's configuration with the device that it ran on, or `auto` if this machine lacks the device."""
    config = config_of(original)
    try:
        recorded = TrainConfig(**config.model_dump() | {"device": original.data.tags.get("device", config.device)})
        pick_device(recorded)
    except ConfigError:
        return config.model_copy(update={"device": "auto"})
    return recorded


@contextmanager
def _cpu_threads(count: str | None) -> Iterator[None]:
    """Compute with this many threads: sums in another order differ in their last bits."""
    before = torch.get_num_threads()
    known = count is not None and count.isdigit() and 0 < int(count) <= 256  # the tag can be anything
    torch.set_num_threads(int(count) if known else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
