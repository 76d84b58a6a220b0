"""Train a recorded run again, and compare the two."""

from typing import NamedTuple

from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import find_data
from demo_lib.recipe import train
from demo_lib.runs import config_of, find_run, histories
from demo_lib.store import open_store
from demo_lib.tracking import PACKAGES, provenance

import pandas as pd
import torch
from mlflow.entities import Run

LABELS = {"mlflow.source.git.commit": "commit", "python_version": "Python", "data_digest": "digest of the data"}
LABELS |= {f"{package}_version": package for package in PACKAGES}


class Comparison(NamedTuple):
    """What `reproduce` found: the new `run`, whether its values are the `same`, and a sentence about it."""

    run: Run
    same: bool
    text: str

    def __str__(self) -> str:
        return self.text


def reproduce(run_id: str, experiment: str = "reproduce") -> Comparison:
    """Train with the run's configuration in a new run, tagged `reproduces`, and compare; the id may be a prefix.

    Prints first what differs here. Trains on the device that the run had, with as many CPU threads, and leaves this
    process with that many. An unknown run, one without a whole `TrainConfig`, or a device that is not here is a
    DemoError.
    """
    open_store()
    original = find_run(run_id)
    config, tags = config_of(original), original.data.tags
    config = TrainConfig(**config.model_dump() | {"device": tags.get("device", config.device)})
    print("\n".join(differences(original)) or "nothing differs here: code, packages and data are the same")
    if tags.get("cpu_threads", "").isdecimal():
        torch.set_num_threads(int(tags["cpu_threads"]))  # sums in another order differ in their last bits
    return compare(original, train(config, experiment, {"reproduces": original.info.run_id}))


def differences(original: Run) -> list[str]:
    """Say in one line each what differs here from where the run was made: code, packages, data."""
    then, here = original.data.tags, provenance() | {"data_digest": find_data().digest}
    other = [tag for tag in LABELS if then.get(tag) != here.get(tag)]
    lines = [f"{LABELS[tag]}: {then.get(tag, 'not recorded')} then, {here.get(tag, 'unknown')} here" for tag in other]
    if then.get("git_dirty") == "true":
        lines.append("uncommitted changes then: the commit alone does not bring back the code that ran")
    if here.get("git_dirty") == "true":
        lines.append("uncommitted changes here: what runs now is not the commit alone")
    if then.get("processes", "1") != "1":
        lines.append(f"processes: {then['processes']} trained together then, one does here: other rounding")
    return lines


def compare(original: Run, again: Run) -> Comparison:
    """Compare the metrics that both runs have, except times and the machine's load, value by value.

    A run that did not finish, such as a pruned trial, is compared as far as it came. Without a metric in common, it is
    a DemoError.
    """
    both = original.data.metrics.keys() & again.data.metrics.keys() - {"fit_seconds"}
    metrics = sorted(name for name in both if not name.startswith("system/"))
    if not metrics:
        raise DemoError(f"run {original.info.run_id} has no metric in common with {again.info.run_id}: choose another.")
    then, now = (_values(run, metrics) for run in (original, again))
    values = pd.DataFrame({"then": then, "now": now}).sort_index()
    if original.info.status != "FINISHED":
        values = values.loc[values.index.isin(then.index)]
    different = values[(values.then != values.now) & values.notna().any(axis=1)]  # NaN is equal to itself
    if different.empty:
        text = f"the same: all {len(values)} values of {', '.join(metrics)} are equal to the last bit"
    else:
        (step, metric, _), first = next(different.iterrows())
        text = f"{metric} at step {step}: {first.then:.9g} then, {first.now:.9g} now"
        text = f"NOT the same: {len(different)} of {len(values)} values differ; first {text}"
    return Comparison(again, different.empty, text)


def _values(run: Run, metrics: list[str]) -> pd.Series:
    """Return the values by step, metric and their number, as several may be logged at one step."""
    history = histories([run.info.run_id], metrics)
    history["number"] = history.groupby(["metric", "step"]).cumcount()
    return history.set_index(["step", "metric", "number"])["value"]
