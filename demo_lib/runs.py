"""Ask the tracking store, in pages and in bulk: runs, children, the best, metric histories, exports."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from demo_lib.config import DemoError, TrainConfig, tracking_uri
from demo_lib.tracking import own_name

import pandas as pd
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric, Run, ViewType
from mlflow.tracking._tracking_service.utils import _get_store
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.rest_utils import http_request_safe

COLUMNS = ["run_id", "name", "status", "start", "seconds", "parent_run_id"]
HISTORY_COLUMNS = ["run_id", "metric", "step", "value", "time"]
PAGE = 5000  # runs a page: MLflow sorts all of them again for each page
SAMPLE = 100  # runs that `best` looks at before it lets the store sort
BULK_RUNS, BULK_POINTS = 100, 25_000  # a server's limits for one answer with metric histories
LARGEST = 1.7976931348623157e308  # MLflow stores infinity as this
WRITERS = {
    ".csv": lambda frame: frame.to_csv(index=False).encode(),
    ".parquet": lambda frame: frame.to_parquet(index=False),
}


class RunError(DemoError):
    """A run, experiment, metric or search that the store doesn't know, or an export that can't be written."""


def find_run(run_id: str) -> Run:
    """Return the run with this id, or the only one whose id begins with these 4 characters or more.

    Raises:
        RunError: there is no such run, it is deleted, or several begin like this; nearest ones are named.
    """
    asked = run_id.strip().lower()
    if not re.fullmatch("[0-9a-f]{4,32}", asked):
        raise RunError(f"{run_id!r} is no run id (4 to 32 digits and letters a-f): {_nearest(asked)}")
    if len(asked) == 32:
        return _get_run(asked)
    names = {number: name for name, number in _experiments().items()}
    found = _search(list(names), f"attributes.run_id LIKE '{asked}%'", limit=6)
    if len(found) > 1:
        candidates = ", ".join(_describe(run, names) for run in found[:5]) + (", ..." if len(found) > 5 else "")
        raise RunError(f"several runs begin with {run_id!r}: give more characters of one of {candidates}.")
    if not found:
        raise RunError(f"no run begins with {run_id!r}: {_nearest(asked)}")
    return found[0]


def runs(
    experiments: Sequence[str] | str, where: str = "", order_by: list[str] | None = None, limit: int | None = None
) -> pd.DataFrame:
    """Return all runs of the experiments (names) that pass the filter, or the first `limit`, the latest first.

    Columns: run_id, name, status, start (UTC), seconds (NaN while it runs), parent_run_id, `params.*` (numbers where
    the whole column is numeric) and `metrics.*` (last values). `where` and `order_by` are in MLflow's language.

    Raises:
        RunError: an experiment is unknown, or MLflow refuses the filter or the order.
    """
    return _frame(_search(_experiment_ids(experiments), where, order_by, limit))


def children(
    parent_run_id: str, where: str = "", order_by: list[str] | None = None, limit: int | None = None
) -> pd.DataFrame:
    """Return the runs nested directly in this one, in the form of `runs`; the id may be a prefix.

    Raises:
        RunError: the parent run is unknown, or MLflow refuses the filter or the order.
    """
    parent = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{find_run(parent_run_id).info.run_id}'"
    return _frame(_search([*_experiments().values()], _and(where, parent), order_by, limit))


def best(experiment: str, metric: str, mode: str = "max", where: str = "", n: int = 1) -> pd.DataFrame:
    """Return the `n` runs with the best last value of the metric, the best first, in the form of `runs`.

    Runs that lack the metric or have NaN are left out. `mode` is max or min; the result has no rows if `where` lets
    no run with the metric pass.

    Raises:
        RunError: the experiment or the metric is unknown, `mode` is another, or MLflow refuses the filter.
    """
    if mode not in ("max", "min"):
        raise RunError(f"mode = {mode!r} is not allowed: it must be max or min.")
    ids = _experiment_ids(experiment)
    bound = _bound(ids, metric, mode, where, n)
    if bound is None:
        _require_metric(experiment, ids, metric)
        return _frame([])
    order = [f"metrics.`{metric}` {'DESC' if mode == 'max' else 'ASC'}"]
    return _frame(_search(ids, _and(where, _at_least(metric, mode, bound)), order, n))


def histories(run_ids: Sequence[str] | str, metrics: Sequence[str] | str) -> pd.DataFrame:
    """Return every logged value of the metrics (full run ids), in bulk: run_id, metric, step, value, time (UTC).

    Ordered by run and metric as given, then step, then time. A run without a metric has no rows for it.

    Raises:
        RunError: a run is unknown.
    """
    run_ids, metrics = list(dict.fromkeys(_listed(run_ids))), list(dict.fromkeys(_listed(metrics)))
    points = [point for metric in metrics for point in _points(run_ids, metric)]
    _require_runs(set(run_ids) - {point[0] for point in points})
    by_run, by_metric = ({name: place for place, name in enumerate(names)} for names in (run_ids, metrics))
    points.sort(key=lambda point: (by_run[point[0]], by_metric[point[1]], point[2], point[4]))
    frame = pd.DataFrame(points, columns=HISTORY_COLUMNS).astype({"step": "int64", "value": "float64"})
    return frame.assign(time=pd.to_datetime(frame["time"].astype("int64"), unit="ms", utc=True))


def params_of(run_id: str) -> dict[str, str]:
    """Return the run's parameters as MLflow keeps them; the id may be a prefix.

    Raises:
        RunError: the run is unknown.
    """
    return find_run(run_id).data.params


def config_of(run: Run) -> TrainConfig:
    """Return the configuration that the run logged.

    Raises:
        RunError: the run didn't log a whole `TrainConfig`.
        ConfigError: a parameter has a value that `TrainConfig` doesn't allow.
    """
    if missing := [name for name in TrainConfig.model_fields if name not in run.data.params]:
        raise RunError(
            f"run {run.info.run_id} ({run.info.run_name}) logged no {', '.join(missing)}: choose a run that logged a "
            "whole TrainConfig."
        )
    return TrainConfig.from_params(run.data.params)


def export_params(run_id: str, path: str | Path) -> None:
    """Write the run's `TrainConfig` as YAML that papermill's `-f` and `python -m demo_lib train` read.

    Raises:
        RunError: the run is unknown or didn't log a whole `TrainConfig`, or the file can't be written.
        ConfigError: a parameter has a value that `TrainConfig` doesn't allow.
    """
    _write(Path(path), config_of(find_run(run_id)).to_yaml().encode())


def export_metrics(run_id: str, path: str | Path) -> None:
    """Write all metric histories of the run, in the form of `histories`, as .csv or .parquet by the path's ending.

    Raises:
        RunError: the run is unknown or has no metrics, the ending is another, or the file can't be written.
    """
    path = Path(path)
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise RunError(f"{path} must end in {', '.join(WRITERS)} or, for the configuration, .yaml.")
    run = find_run(run_id)
    if not run.data.metrics:
        raise RunError(f"run {run.info.run_id} ({run.info.run_name}) has logged no metrics: choose another run.")
    _write(path, writer(histories(run.info.run_id, sorted(run.data.metrics))))


def _get_run(run_id: str) -> Run:
    try:
        run = MlflowClient(tracking_uri()).get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise RunError(f"no run has the id {run_id!r}: {_nearest(run_id)}") from None
    if run.info.lifecycle_stage == "deleted":
        raise RunError(f"run {run_id} is deleted: `mlflow runs restore --run-id {run_id}` brings it back.")
    return run


def _nearest(asked: str) -> str:
    """Name the recent runs whose id or name is near to what was asked for, or else the latest runs."""
    names = {number: name for name, number in _experiments().items()}
    recent = _search(list(names), limit=200)
    if not recent:
        return "the store has no runs yet; train one, or set MLFLOW_TRACKING_URI to the store that has it."
    keys = {run.info.run_name: run for run in recent} | {run.info.run_id[: len(asked)]: run for run in recent}
    near = [keys[key] for key in get_close_matches(asked, keys, n=3)]
    which = "nearest" if near else "latest"
    described = ", ".join(_describe(run, names) for run in near or recent[:3])
    return f"copy one of the {which} ids, {described}, or set MLFLOW_TRACKING_URI to the store that has the run."


def _describe(run: Run, names: dict[str, str]) -> str:
    return f"{run.info.run_id} ({run.info.run_name} in {names[run.info.experiment_id]})"


def _listed(names: Sequence[str] | str) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _and(*conditions: str) -> str:
    return " AND ".join(condition for condition in conditions if condition.strip())


def _bound(experiment_ids: list[str], metric: str, mode: str, where: str, n: int) -> float | None:
    """Return a value that few runs reach but the `n` best do, None if no run has the metric.

    SQLite sorts by a metric in quadratic time, so `best` narrows first: the n-th best of a sample, twice.
    """
    bound = -LARGEST if mode == "max" else LARGEST
    size = max(SAMPLE, 5 * n)
    for _ in range(2):
        reach = _and(where, _at_least(metric, mode, bound))
        sample = _search(experiment_ids, reach, ["attributes.run_id"], size)  # ids are random, so is the sample
        if not sample:
            return None
        values = sorted((run.data.metrics[metric] for run in sample), reverse=mode == "max")
        bound = values[n - 1] if len(values) >= n else bound
        if len(values) < size:
            break
    return bound


def _at_least(metric: str, mode: str, bound: float) -> str:
    """Return the filter for values as good as the bound or better."""
    number = repr(bound).replace("e+", "e")  # MLflow's parser stumbles over the plus sign of 1e+20
    return f"metrics.`{metric}` {'>=' if mode == 'max' else '<='} {number}"


def _experiments() -> dict[str, str]:
    """Return the ids of all active experiments by name."""
    client, token, found = MlflowClient(tracking_uri()), None, {}
    while True:
        page = client.search_experiments(max_results=1000, page_token=token)
        found |= {experiment.name: experiment.experiment_id for experiment in page}
        if not (token := page.token):
            return found


def _experiment_ids(names: Sequence[str] | str) -> list[str]:
    known = _experiments()
    asked = [own if (own := own_name(name)) in known else name for name in _listed(names)]
    for name in asked:
        if name not in known:
            shown = [*(get_close_matches(name, known, n=10, cutoff=0) if len(known) > 10 else known)]
            more = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
            raise RunError(f"the store has no experiment {name!r}; it has {', '.join(shown)}{more}.")
    return [known[name] for name in asked]


def _search(
    experiment_ids: list[str],
    where: str = "",
    order_by: list[str] | None = None,
    limit: int | None = None,
    view: int = ViewType.ACTIVE_ONLY,
) -> list[Run]:
    """Return all the runs that pass, page by page, or the first `limit` of them."""
    client, token = MlflowClient(tracking_uri()), None
    found: dict[str, Run] = {}  # by id: a run that starts meanwhile moves others to the next page, which repeats them
    try:
        while True:
            size = PAGE if limit is None else min(PAGE, limit - len(found))
            page = client.search_runs(experiment_ids, where, view, size, order_by, token)
            found |= {run.info.run_id: run for run in page}
            token = page.token
            if not token or len(found) == limit:
                return list(found.values())
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise RunError(_refusal(where, order_by, error)) from None


def _refusal(where: str, order_by: list[str] | None, error: MlflowException) -> str:
    reason = error.message.removeprefix(f"{error.error_code}: ").splitlines()[0].rstrip(".")
    what = " and ".join(
        f"{name} = {value!r}" for name, value in {"where": where, "order_by": order_by}.items() if value
    )
    return (
        f"MLflow refuses the search{f' with {what}' if what else ''}: {reason}; write conditions such as "
        "metrics.val_loss < 0.4 AND params.seed = '0', and orders such as metrics.val_loss DESC."
    )


def _frame(found: list[Run]) -> pd.DataFrame:
    frame = pd.DataFrame([_row(run) for run in found])
    values = sorted(set(frame) - set(COLUMNS), key=lambda column: (column.startswith("metrics."), column))
    frame = frame.reindex(columns=[*COLUMNS, *values])
    params = {column: _as_numbers(frame[column]) for column in values if column.startswith("params.")}
    return frame.assign(start=pd.to_datetime(frame["start"], unit="ms", utc=True), **params)


def _row(run: Run) -> dict[str, object]:
    info = run.info
    seconds = (info.end_time - info.start_time) / 1000 if info.end_time else float("nan")
    parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID)
    row = dict(zip(COLUMNS, [info.run_id, info.run_name, info.status, info.start_time, seconds, parent], strict=True))
    row |= {f"params.{name}": value for name, value in run.data.params.items()}
    return row | {f"metrics.{name}": value for name, value in run.data.metrics.items()}


def _as_numbers(column: pd.Series) -> pd.Series:
    """Convert the column if each text in it is a number; pandas would take an empty text for a missing one."""
    if (column == "").any():
        return column
    try:
        return pd.to_numeric(column)
    except ValueError:
        return column


def _require_metric(experiment: str, experiment_ids: list[str], metric: str) -> None:
    """Raise unless a run of the experiment has a value of the metric; names those that its latest runs have."""
    if _search(experiment_ids, _at_least(metric, "max", -LARGEST), limit=1):
        return
    known = sorted({name for run in _search(experiment_ids, limit=100) for name in run.data.metrics})
    have = f"its runs have {', '.join(known)}" if known else "its runs have no metrics yet"
    raise RunError(f"no run of {experiment!r} has a value of the metric {metric!r}; {have}.")


def _require_runs(run_ids: set[str]) -> None:
    for batch in _batches(sorted(run_ids)):
        quoted = ", ".join(f"'{run_id}'" for run_id in batch)
        ids = [*_experiments().values()]
        known = {run.info.run_id for run in _search(ids, f"attributes.run_id IN ({quoted})", view=ViewType.ALL)}
        if unknown := [run_id for run_id in batch if run_id not in known]:
            raise RunError(f"no run has the id {unknown[0]!r}: {_nearest(unknown[0])}")


def _batches(run_ids: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(run_ids), BULK_RUNS):
        yield run_ids[start : start + BULK_RUNS]


def _points(run_ids: list[str], metric: str) -> Iterator[tuple]:
    """Yield the points of one metric in the order of `HISTORY_COLUMNS`, time in milliseconds.

    MLflow's public client asks run by run, which is ten times slower: this uses the calls that its UI uses.
    """
    store = _get_store(tracking_uri())
    in_bulk = hasattr(store, "get_metric_history_bulk")
    for batch in _batches(run_ids):
        if in_bulk:
            found = store.get_metric_history_bulk(batch, metric, 2**31 - 1)
            yield from (_point(each.run_id, each) for each in found)
        else:
            yield from _points_by_http(store, batch, metric)


def _points_by_http(store: object, run_ids: list[str], metric: str) -> Iterator[tuple]:
    """Ask until no answer is cut: one holds `BULK_POINTS` at most, run after run, and doesn't say that more exist."""
    while run_ids:
        query = [("metric_key", metric), ("max_results", BULK_POINTS), *(("run_id", run_id) for run_id in run_ids)]
        endpoint = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
        found = http_request_safe(store.get_host_creds(), endpoint, "GET", params=query).json()["metrics"]
        cut = found[-1]["run_id"] if len(found) >= BULK_POINTS else None
        for each in found:
            if each["run_id"] != cut:
                yield each["run_id"], metric, int(each["step"]), each["value"], int(each["timestamp"])
        if cut is None:
            return
        yield from (_point(cut, each) for each in MlflowClient(tracking_uri()).get_metric_history(cut, metric))
        seen = {each["run_id"] for each in found}
        run_ids = [run_id for run_id in run_ids if run_id not in seen]


def _point(run_id: str, point: Metric) -> tuple:
    return run_id, point.key, point.step, point.value, point.timestamp


def _write(path: Path, content: bytes) -> None:
    """Write beside the file and rename: it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"{path} can't be written ({error.strerror}): name a file in an existing folder that can be written."
        ) from None
