"""Ask the tracking store: runs, children, the best, metric histories, exports."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from demo_lib import internals
from demo_lib.config import DemoError, TrainConfig, tracking_uri, whole_file
from demo_lib.store import own_name

import mlflow
import pandas as pd
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Run

COLUMNS = ["run_id", "name", "status", "start", "seconds", "parent_run_id"]
HISTORY_COLUMNS = ["run_id", "metric", "step", "value", "time"]
MANY = 1_000_000
BULK_RUNS = 100  # a server's limit for one answer with metric histories


def find_run(run_id: str) -> Run:
    """Return the run with this id, or the only one whose id begins with these 4 characters or more.

    If there is no such run, it is deleted, or several begin like this, it is a DemoError that names near ones.
    """
    asked = run_id.strip().lower()
    if len(asked) == 32:
        if (run := _get_run(asked)).info.lifecycle_stage == "deleted":
            raise DemoError(f"run {asked} is deleted: `mlflow runs restore --run-id {asked}` brings it back.")
        return run
    found = []
    if re.fullmatch("[0-9a-f]{4,31}", asked):
        like = f"attributes.run_id LIKE '{asked}%'"
        found = _search([*_experiments().values()], like, limit=6, output_format="list")
    if not found:
        raise DemoError(f"no run's id begins with {run_id!r} (at least 4 digits and letters a-f): {_nearest(asked)}")
    if len(found) > 1:
        candidates = _describe(found[:5]) + (", ..." if len(found) > 5 else "")
        raise DemoError(f"several runs begin with {run_id!r}: give more characters of one of {candidates}.")
    return found[0]


def runs(
    experiments: Sequence[str] | str, where: str = "", order_by: list[str] | None = None, limit: int | None = None
) -> pd.DataFrame:
    """Return all runs of the experiments (names) that pass the filter, or the first `limit`, the latest first.

    Columns: run_id, name, status, start (UTC), seconds (NaN while it runs), parent_run_id, `params.*` (numbers where
    the whole column is numeric) and `metrics.*` (last values). `where` and `order_by` are in MLflow's language. An
    unknown experiment, and a filter or an order that MLflow refuses, are a DemoError.
    """
    return _frame(_search(_experiment_ids(experiments), where, order_by, limit))


def children(
    parent_run_id: str, where: str = "", order_by: list[str] | None = None, limit: int | None = None
) -> pd.DataFrame:
    """Return the runs nested directly in this one, in the form and with the errors of `runs`; a prefix will do."""
    nested = f"tags.mlflow.parentRunId = '{find_run(parent_run_id).info.run_id}'"
    where = f"{where} AND {nested}" if where.strip() else nested
    return _frame(_search([*_experiments().values()], where, order_by, limit))


def best(experiment: str, metric: str, mode: str = "max", where: str = "", n: int = 1) -> pd.DataFrame:
    """Return the `n` runs with the best last value of the metric, the best first, in the form of `runs`.

    Runs that lack the metric or have NaN are left out. `mode` is max or min. The result has no rows if `where` lets no
    run with the metric pass; an unknown experiment, metric or mode, or a refused filter, is a DemoError.
    """
    if mode not in ("max", "min"):
        raise DemoError(f"mode = {mode!r} is not allowed: it must be max or min.")
    ids, order = _experiment_ids(experiment), [f"metrics.`{metric}` {'DESC' if mode == 'max' else 'ASC'}"]
    found = _frame(_search(ids, where, order, n))
    if f"metrics.{metric}" in found:
        return found.dropna(subset=[f"metrics.{metric}"])  # MLflow sorts those without a value last
    latest = pd.concat([_search(ids, order_by=order, limit=1), _search(ids, limit=100)])  # has any run the metric?
    known = sorted(name.removeprefix("metrics.") for name in latest if name.startswith("metrics."))
    if metric not in known:
        have = f"its runs have {', '.join(known)}" if known else "its runs have no metrics yet"
        raise DemoError(f"no run of {experiment!r} has a value of the metric {metric!r}; {have}.")
    return found[:0]


def histories(run_ids: Sequence[str] | str, metrics: Sequence[str] | str) -> pd.DataFrame:
    """Return every logged value of the metrics (full run ids), in bulk: run_id, metric, step, value, time (UTC).

    Ordered by run and metric as given, step and time; an unknown run is a DemoError.
    """
    run_ids, metrics = _listed(run_ids), _listed(metrics)
    points, uri = [], tracking_uri()
    for start in range(0, len(run_ids), BULK_RUNS):
        for metric in metrics:
            found = internals.metric_histories(uri, run_ids[start : start + BULK_RUNS], metric)
            points += [(run_id, metric, each.step, each.value, each.timestamp) for run_id, each in found]
    for run_id in set(run_ids) - {point[0] for point in points}:
        _get_run(run_id)  # refuses an unknown one
    by_run, by_metric = ({name: place for place, name in enumerate(names)} for names in (run_ids, metrics))
    points.sort(key=lambda point: (by_run[point[0]], by_metric[point[1]], point[2], point[4]))
    frame = pd.DataFrame(points, columns=HISTORY_COLUMNS).astype({"step": "int64", "value": "float64"})
    return frame.assign(time=pd.to_datetime(frame["time"].astype("int64"), unit="ms", utc=True))


def config_of(run: Run) -> TrainConfig:
    """Return the configuration that the run logged; without a whole `TrainConfig` it is a DemoError."""
    if missing := [name for name in TrainConfig.model_fields if name not in run.data.params]:
        raise DemoError(f"run {run.info.run_id} logged no {', '.join(missing)}: choose a run that logged them all.")
    return TrainConfig.from_params(run.data.params)


def export(run_id: str, path: str | Path) -> None:
    """Write the run's configuration (.yaml, for papermill's `-f` and `demo_lib train`) or its metrics (.csv, .parquet).

    A run that is unknown or has not logged this, another ending, and a path that can't be written are a DemoError.
    """
    path, run = Path(path), find_run(run_id)
    kind = path.suffix.lower()
    if kind in (".yaml", ".yml"):
        content = config_of(run).to_yaml().encode()
    elif kind not in (".csv", ".parquet"):
        raise DemoError(f"{path} must end in .csv or .parquet or, for the configuration, in .yaml.")
    elif not run.data.metrics:
        raise DemoError(f"run {run.info.run_id} ({run.info.run_name}) has logged no metrics: choose another run.")
    else:
        frame = histories(run.info.run_id, sorted(run.data.metrics))
        content = frame.to_parquet(index=False) if kind == ".parquet" else frame.to_csv(index=False).encode()
    try:
        with whole_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise DemoError(f"{path} can't be written ({error.strerror}): name a file in a folder that can be.") from None


def _get_run(run_id: str) -> Run:
    try:
        return MlflowClient(tracking_uri()).get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        raise DemoError(f"no run has the id {run_id!r}: {_nearest(run_id)}") from None


def _nearest(asked: str) -> str:
    """Name the recent runs whose id or name is near to what was asked for, or else the latest runs."""
    recent = _search([*_experiments().values()], limit=200, output_format="list")
    if not recent:
        return "the store has no runs yet; train one, or set MLFLOW_TRACKING_URI to the store that has it."
    keys = {run.info.run_name: run for run in recent} | {run.info.run_id[: len(asked)]: run for run in recent}
    near = [keys[key] for key in get_close_matches(asked, keys, n=3)]
    which, shown = ("nearest", near) if near else ("latest", recent[:3])
    return f"copy one of the {which} ids, {_describe(shown)}, or set MLFLOW_TRACKING_URI to the store that has the run."


def _describe(found: list[Run]) -> str:
    names = {number: name for name, number in _experiments().items()}
    return ", ".join(f"{run.info.run_id} ({run.info.run_name} in {names[run.info.experiment_id]})" for run in found)


def _listed(names: Sequence[str] | str) -> list[str]:
    return [names] if isinstance(names, str) else list(dict.fromkeys(names))


def _experiments() -> dict[str, str]:
    """Return the ids of all active experiments by name."""
    mlflow.set_tracking_uri(tracking_uri())
    return {experiment.name: experiment.experiment_id for experiment in mlflow.search_experiments()}


def _experiment_ids(names: Sequence[str] | str) -> list[str]:
    known = _experiments()
    asked = [own if (own := own_name(name)) in known else name for name in _listed(names)]
    for name in asked:
        if name not in known:
            near = get_close_matches(name, known, n=10, cutoff=0)
            raise DemoError(f"the store has no experiment {name!r}; it has {', '.join(near)}, {len(known)} in all.")
    return [known[name] for name in asked]


def _search(
    ids: list[str], where: str = "", order_by: list[str] | None = None, limit: int | None = None, **options: Any
) -> Any:
    """Let MLflow follow the pages; what it refuses is one sentence."""
    try:
        return mlflow.search_runs(
            ids, where, order_by=order_by, max_results=MANY if limit is None else limit, **options
        )
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        reason = error.message.removeprefix(f"{error.error_code}: ").splitlines()[0].rstrip(".")
        raise DemoError(
            f"MLflow refuses the search with where = {where!r}, order_by = {order_by!r}: {reason}; write conditions as "
            "metrics.val_loss < 0.4 AND params.seed = '0', and orders such as metrics.val_loss DESC."
        ) from None


def _frame(found: pd.DataFrame) -> pd.DataFrame:
    """Return what MLflow found in the form of `runs`."""
    if found.empty:
        found = pd.DataFrame(columns=["run_id", "status", "start_time", "end_time"])
    found = found.drop_duplicates("run_id")  # a run that starts meanwhile shifts the pages
    start, end = (pd.to_datetime(found[name], utc=True) for name in ("start_time", "end_time"))
    name, parent = (found.get(f"tags.mlflow.{tag}") for tag in ("runName", "parentRunId"))
    own = [found["run_id"], name, found["status"], start, (end - start).dt.total_seconds(), parent]
    columns = dict(zip(COLUMNS, own, strict=True))
    columns |= {name: _as_numbers(found[name]) for name in sorted(found) if name.startswith("params.")}
    columns |= {name: found[name] for name in sorted(found) if name.startswith("metrics.")}
    return pd.DataFrame(columns).reset_index(drop=True)


def _as_numbers(column: pd.Series) -> pd.Series:
    """Convert the column if each text in it is a number; pandas would take an empty text for a missing one."""
    try:
        return column if (column == "").any() else pd.to_numeric(column)
    except ValueError:
        return column
