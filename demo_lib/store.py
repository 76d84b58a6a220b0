"""The tracking store: which one and whose experiment, runs that were left behind, links into the MLflow UI."""

import html
import os
import re
import socket
import sqlite3
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from demo_lib.config import DemoError, settings, sqlite_file, sqlite_uri, tracking_uri, whole_file

import mlflow
import psutil
from filelock import FileLock
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Experiment, Run, ViewType
from mlflow.entities.model_registry import RegisteredModel
from mlflow.environment_variables import MLFLOW_RUN_ID

# MLflow's private parts, as in MLflow 3.17.2; `tests/unit/test_internals.py` names what another version has changed.
from mlflow.utils.credentials import get_default_host_creds  # isort: skip
from mlflow.utils.rest_utils import http_request  # isort: skip


def connect(experiment: str) -> Experiment:
    """Choose the tracking store, make the experiment the active one, close runs that died, and return the experiment.

    The store is `MLFLOW_TRACKING_URI` if set, else SQLite with artifacts beside it in the folder `store/`. In a process
    that `mlflow run` started, the experiment is that of the run which MLflow opened for it, whatever the name:
    `mlflow.start_run` goes on in that run. With a login to a server, it is one of your own, see `own_name`.
    A server that doesn't answer, and a store or an experiment that can't be used, are a DemoError.
    """
    database, client, name = sqlite_file(open_store()), MlflowClient(), own_name(experiment)
    if MLFLOW_RUN_ID.get():
        found = mlflow.set_experiment(experiment_id=_opened_run().info.experiment_id)
    else:
        location = (database.parent / "artifacts" / experiment).as_uri() if database else None
        try:
            if client.get_experiment_by_name(name) is None:
                with suppress(MlflowException):  # another process was faster, or `set_experiment` says what is wrong
                    client.create_experiment(name, location)
            found = mlflow.set_experiment(name)
        except MlflowException as error:
            raise DemoError(f"experiment {name!r} can't be used: {error.message}") from None
    close_stale_runs([found.experiment_id])
    return found


def open_store() -> str:
    """Choose the tracking store as `connect` does, with the same errors but no experiment, and return its address."""
    uri = tracking_uri()
    if (database := sqlite_file(uri)) is not None:
        make_store(database)
    elif uri.startswith("http"):
        _ask_server(uri)
    elif uri.partition(":")[0].partition("+")[0] not in ("postgresql", "mysql", "mssql", "databricks"):
        what = "set it to a server's http address, to sqlite:/// and the path of a file, or to a database's address"
        raise DemoError(f"MLFLOW_TRACKING_URI = {without_login(uri)!r} is no store: {what}, or unset it.")
    mlflow.set_tracking_uri(uri)
    return uri


def own_name(experiment: str) -> str:
    """Return the experiment's name for you: on a server with a login `LOGIN/` comes before one that has no slash."""
    login = _login()
    return f"{login}/{experiment}" if login and "/" not in experiment else experiment


def own_model_name(model: str) -> str:
    """Return the name that the registered model has for you: on a server with a login, `LOGIN.` comes before it."""
    login = _login()
    return f"{login}.{model}" if login and not model.startswith(f"{login}.") else model


@dataclass(frozen=True)
class Link:
    """An address that a notebook shows as a link and a terminal as text."""

    url: str
    text: str

    def __str__(self) -> str:
        return self.url

    def _repr_html_(self) -> str:
        return f'<a href="{html.escape(self.url)}" target="_blank" rel="noopener">{html.escape(self.text)}</a>'


def ui_link(of: Run | Experiment | RegisteredModel) -> Link:
    """Return the link to the run's, the experiment's or the registered model's page in the MLflow UI."""
    uri = tracking_uri()
    base = without_login(uri).rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{settings().ui_port}"
    if isinstance(of, RegisteredModel):
        return Link(f"{base}/#/models/{quote(of.name, safe='')}", f"model {of.name} in the MLflow UI")
    if isinstance(of, Run):
        page, text = f"{of.info.experiment_id}/runs/{of.info.run_id}", f"run {of.info.run_name}"
    else:
        page, text = f"{of.experiment_id}/runs", f"experiment {of.name}"
    # Without workflowType a fresh browser opens the page for generative AI.
    return Link(f"{base}/#/experiments/{page}?workflowType=machine_learning", f"{text} in the MLflow UI")


def this_process() -> str:
    """Return what tells this process from all others: host, process id and start, as in a run's tag `process`."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"


def died_here(run: Run) -> bool:
    """Whether the run's process was on this machine and is gone; its start tells it from a later one of that pid."""
    host, pid, start = run.data.tags["process"].rsplit(":", 2)
    try:
        return host == socket.gethostname() and abs(psutil.Process(int(pid)).create_time() - float(start)) >= 2
    except psutil.NoSuchProcess:
        return True


def close_stale_runs(experiment_ids: list[str]) -> None:
    """End as KILLED the runs left RUNNING by processes of this machine that are gone."""
    unfinished = f"attributes.status = 'RUNNING' AND tags.process LIKE '{socket.gethostname()}:%'"
    for run in MlflowClient().search_runs(experiment_ids, unfinished, ViewType.ALL):
        if died_here(run):
            kill_run(run.info.run_id)


def kill_run(run_id: str) -> None:
    """End as KILLED a run whose process is gone, and say so in its tag `error`."""
    client = MlflowClient()
    client.set_tag(run_id, "error", "its process ended without closing the run")
    client.set_terminated(run_id, "KILLED")


def make_store(database: Path) -> None:
    """Make the SQLite store if it is not there; a place that can't be written, or is a folder, is a DemoError."""
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        # One process makes the tables while others wait: they would break each other's.
        with FileLock(database.with_name(f".{database.name}.lock")) if not database.is_file() else nullcontext():
            if not database.is_file():
                with whole_file(database) as partial:
                    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # private; takes a second

                    # MLflow's only public way to make the tables is to start a whole server.
                    SqlAlchemyStore(sqlite_uri(partial), (database.parent / "artifacts").as_uri())._dispose_engine()
        _speed_up_sorting(database)
    except (OSError, sqlite3.DatabaseError) as error:
        what = "set DEMO_HOME or MLFLOW_TRACKING_URI to a place that can be written, and where no other file lies"
        raise DemoError(f"the store {database} can't be used ({error}): {what}.") from None


def _speed_up_sorting(database: Path) -> None:
    """Tell SQLite's planner that `latest_metrics` is large: else sorting runs by a metric takes quadratic time."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(database, timeout=5)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_stat1'").fetchone():
            connection.execute("ANALYZE alembic_version")  # makes the table of statistics
            rows = "40000 400 1"  # in all, of a metric, of a metric of a run
            index = ("latest_metrics", "sqlite_autoindex_latest_metrics_1", rows)
            connection.execute("INSERT INTO sqlite_stat1 VALUES (?, ?, ?)", index)


def _opened_run() -> Run:
    """Return the run that `mlflow run` opened for this process."""
    with suppress(MlflowException):
        if (run := mlflow.get_run(MLFLOW_RUN_ID.get())).info.status == "RUNNING":
            return run
    what = f"MLFLOW_RUN_ID = {MLFLOW_RUN_ID.get()} is no open run of the store {without_login(tracking_uri())}"
    todo = "before `mlflow run` set MLFLOW_TRACKING_URI to a store's whole address, as sqlite:////home/me/mlflow.db"
    raise DemoError(f"{what}: {todo}; else unset MLFLOW_RUN_ID.")


def without_login(uri: str) -> str:
    """Return the address as it may be shown: without a name and a password."""
    return re.sub("//[^/]*@", "//", uri, count=1)


def _login() -> str:
    """Return the name that MLflow sends to a server, from the environment or its credentials file, or an empty one."""
    uri = tracking_uri()
    return (get_default_host_creds(uri).username or "") if uri.startswith("http") else ""


def _ask_server(uri: str) -> None:
    """Ask once, for 4 s at most: with MLflow's default retries a wrong address takes minutes to fail."""
    shown, search = without_login(uri), "/api/2.0/mlflow/experiments/search"
    once = {"max_retries": 0, "timeout": 4, "raise_on_status": False, "json": {"max_results": 1}}
    try:
        status = http_request(get_default_host_creds(uri), search, "POST", **once).status_code
    except MlflowException:
        todo = "start it, or correct or unset MLFLOW_TRACKING_URI"
        raise DemoError(f"no MLflow server answers at {shown}: {todo}.") from None
    if status in (401, 403):
        todo = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and ask if this host name is allowed"
        raise DemoError(f"the server at {shown} refuses you ({status}): {todo}.")
    if status != 200:
        raise DemoError(f"{shown} answers {status} and is no MLflow server: correct MLFLOW_TRACKING_URI.")
