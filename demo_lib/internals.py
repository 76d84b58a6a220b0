"""The parts of MLflow that it does not promise to keep, each as it was in MLflow 3.17.2, and what each is for.

They are imported where they are used: some take a second to load. `tests/unit/test_internals.py` names the part that
another MLflow has changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, http_request_safe

HISTORIES = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
BULK_POINTS = 25_000  # a server's limit for one answer with metric histories


def login(uri: str) -> str:
    """Return the user name that MLflow sends to a server, from the environment or its credentials file, or ""."""
    return (get_default_host_creds(uri).username or "") if uri.startswith("http") else ""


def ask(uri: str, endpoint: str, method: str, **options: Any) -> requests.Response:
    """Send one request as MLflow's client does, with its login, but once: the client itself tries again for minutes."""
    return http_request(get_default_host_creds(uri), endpoint, method, max_retries=0, **options)


def make_store(uri: str, artifacts: str) -> None:
    """Make the tables of a new store: the public way to them is a whole server."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, artifacts)._dispose_engine()


def active_experiment_id() -> str:
    """Return the id of the experiment that `mlflow.start_run` would take; publicly, only a run knows it."""
    return mlflow.tracking.fluent._get_experiment_id()


def metric_histories(uri: str, run_ids: list[str], metric: str) -> Iterator[tuple[str, Metric]]:
    """Yield each value of the metric with its run's id, asked as MLflow's UI does: its public client asks run by run.

    A server answers with `BULK_POINTS` values at most, run after run, and does not say that there are more: the last
    run of a full answer may be cut off. It is asked for alone, and then those that come after it.
    """
    from mlflow.tracking._tracking_service.utils import _get_store

    store = _get_store(uri)
    if hasattr(store, "get_metric_history_bulk"):
        yield from ((each.run_id, each) for each in store.get_metric_history_bulk(run_ids, metric, 2**31 - 1))
        return
    while run_ids:
        query = [("metric_key", metric), ("max_results", BULK_POINTS), *(("run_id", run_id) for run_id in run_ids)]
        answer = http_request_safe(store.get_host_creds(), HISTORIES, "GET", params=query)
        found = answer.json()["metrics"]
        incomplete = found[-1]["run_id"] if len(found) >= BULK_POINTS else None
        for each in found:
            if each["run_id"] != incomplete:
                yield each["run_id"], Metric(metric, each["value"], int(each["timestamp"]), int(each["step"]))
        if incomplete is None:
            return
        yield from ((incomplete, each) for each in MlflowClient(uri).get_metric_history(incomplete, metric))
        seen = {each["run_id"] for each in found}
        run_ids = [run_id for run_id in run_ids if run_id not in seen]
