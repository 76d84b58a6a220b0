"""Ask the tracking store: runs, children, the best, metric histories, exports."""

import re
from collections.abc import Sequence
from pathlib import Path

from demo_lib.config import DemoError, TrainConfig, tracking_uri, without_login, write_file
from demo_lib.store import own_name

import mlflow
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

COLUMNS = ["run_id", "name", "status", "start", "seconds", "parent_run_id"]
HISTORY_COLUMNS = ["run_id", "metric", "step", "value", "time"]
MANY = 1_000_000  # MLflow follows the pages up to 100,000 runs by itself


def find_run(run_id: str) -> Run:
    """Return the only run whose id begins with these 4 to 32 characters; a DemoError if none does or it is deleted."""
    asked, found = run_id.strip().lower(), []
    if re.fullmatch("[0-9a-f]{4,32}", asked):
        mlflow.set_tracking_uri(tracking_uri())
        like = f"attributes.run_id LIKE '{asked}%'"
        found = mlflow.search_runs(None, like, ViewType.ALL, 3, output_format="list", search_all_experiments=True)
    if not found:
        what = f"no run's id begins with {run_id!r} (at least 4 digits and letters a-f)"
        todo = "copy an id from the MLflow UI, or set MLFLOW_TRACKING_URI to the store that has the run"
        raise DemoError(f"{what} in {without_login(tracking_uri())}: {todo}.")
    if len(found) > 1:
        raise DemoError(f"the ids of several runs begin with {run_id!r}: give more characters.")
    if found[0].info.lifecycle_stage == "deleted":
        full = found[0].info.run_id
        todo = f"set MLFLOW_TRACKING_URI to {without_login(tracking_uri())} and `mlflow runs restore --run-id {full}`"
        raise DemoError(f"run {full} is deleted: {todo}.")
    return found[0]


def runs(experiment: str, where: str = "", order_by: list[str] | None = None, limit: int = MANY) -> pd.DataFrame:
    """Return all runs of the experiment (its name) that pass the filter, or the first `limit`, the latest first.

    Columns: run_id, name, status, start (UTC), seconds (NaN while it runs), parent_run_id, `params.*` (numbers where
    the whole column is numeric) and `metrics.*` (last values). `where` and `order_by` are in MLflow's language, and
    errors in them MLflow's. An experiment that is not in the store is a DemoError.
    """
    known = _experiments()
    if (found := known.get(own_name(experiment)) or known.get(experiment)) is None:
        raise DemoError(f"the store has no experiment {experiment!r}; it has {', '.join(sorted(known))}.")
    return _search([found], where, order_by, limit)


def children(parent_run_id: str, where: str = "", order_by: list[str] | None = None) -> pd.DataFrame:
    """Return the runs nested directly in this one, in the form of `runs`; errors are those of `find_run`."""
    nested = f"tags.mlflow.parentRunId = '{find_run(parent_run_id).info.run_id}'"
    return _search([*_experiments().values()], f"{where} AND {nested}" if where else nested, order_by)


def best(experiment: str, metric: str, mode: str = "max", where: str = "", n: int = 1) -> pd.DataFrame:
    """Return the `n` runs with the best (max or min) last value of the metric; without one it is a DemoError."""
    found = runs(experiment, where, [f"metrics.`{metric}` {'DESC' if mode == 'max' else 'ASC'}"], n)
    if f"metrics.{metric}" not in found:
        raise DemoError(f"no run of {experiment!r} that was asked for has the metric {metric!r}: correct its name.")
    return found.dropna(subset=[f"metrics.{metric}"])  # MLflow sorts those without a value last


def histories(run_ids: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Return every logged value of the metrics (full run ids): run_id, metric, step, value, time (UTC).

    Ordered by run and metric as given, step and time. A run that is not in the store is a DemoError.
    """
    client = MlflowClient(tracking_uri())
    points = [
        (run_id, metric, point.step, point.value, point.timestamp)
        for run_id in run_ids
        for metric in metrics
        for point in sorted(client.get_metric_history(run_id, metric), key=lambda point: (point.step, point.timestamp))
    ]
    for run_id in set(run_ids) - {point[0] for point in points}:
        find_run(run_id)
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
    path, run, kind = Path(path), find_run(run_id), Path(path).suffix.lower()
    if kind in (".yaml", ".yml"):
        content = config_of(run).to_yaml().encode()
    elif kind not in (".csv", ".parquet"):
        raise DemoError(f"{path} must end in .csv or .parquet or, for the configuration, in .yaml.")
    elif not run.data.metrics:
        raise DemoError(f"run {run.info.run_id} has logged no metrics: choose another run.")
    else:
        frame = histories([run.info.run_id], sorted(run.data.metrics))
        content = frame.to_parquet(index=False) if kind == ".parquet" else frame.to_csv(index=False).encode()
    write_file(path, content)


def _experiments() -> dict[str, str]:
    """Return the ids of all active experiments by name."""
    mlflow.set_tracking_uri(tracking_uri())
    return {experiment.name: experiment.experiment_id for experiment in mlflow.search_experiments()}


def _search(ids: list[str], where: str, order_by: list[str] | None = None, limit: int = MANY) -> pd.DataFrame:
    found = mlflow.search_runs(ids, where, order_by=order_by, max_results=limit)
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
