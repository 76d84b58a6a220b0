"""The tracking store: which one and whose experiment, runs that were left behind, links into the MLflow UI."""

import html
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import quote

from demo_lib.config import DemoError, restored_variables, settings, sqlite_file, tracking_uri, without_login
from demo_lib.identity import lives

import mlflow
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Experiment, Metric, Run
from mlflow.entities.model_registry import RegisteredModel
from mlflow.environment_variables import MLFLOW_RUN_ID

# MLflow's private parts, as in MLflow 3.17.2; `tests/unit/test_internals.py` names what another version has changed.
from mlflow.utils.credentials import get_default_host_creds  # isort: skip
from mlflow.utils.rest_utils import http_request  # isort: skip

Login = tuple[str, str] | None  # a name and a password
POINTS = 25_000  # of several metric histories, that a server returns at once

logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # pages of what the exceptions say, too


def connect(experiment: str) -> Experiment:
    """Choose the tracking store, make the experiment the active one, close runs that died, and return the experiment.

    The store is `MLFLOW_TRACKING_URI` if set, else SQLite with artifacts beside it in the folder `store/`. In a process
    that `mlflow run` started, the experiment is that of the run which MLflow opened for it, whatever the name:
    `mlflow.start_run` goes on in that run. With a login to a server, it is one of your own, see `own_name`.
    A server that doesn't answer, and a store or an experiment that can't be used, are a DemoError.
    """
    uri, client, name = open_store(), MlflowClient(), own_name(experiment)
    database = sqlite_file(uri)
    if database:
        from demo_lib.databases import refuse_reader

        refuse_reader(database)
    if MLFLOW_RUN_ID.get():
        found = mlflow.set_experiment(experiment_id=_opened_run().info.experiment_id)
    else:
        try:
            if client.get_experiment_by_name(name) is None:
                with suppress(MlflowException):  # another process was faster, or `set_experiment` says what is wrong
                    client.create_experiment(name, artifact_root(uri, name))
            found = mlflow.set_experiment(name)
        except MlflowException as error:
            reason = error.message.partition("\n")[0]  # the next lines are SQL
            raise DemoError(f"experiment {name!r} can't be used: {reason}") from None
    close_stale_runs([found.experiment_id])
    return found


def open_store() -> str:
    """Choose the tracking store as `connect` does, with the same errors but no experiment, and return its address."""
    uri = tracking_uri()
    reach(uri)
    mlflow.set_tracking_uri(uri)
    return uri


def reach(uri: str, given_as: str = "MLFLOW_TRACKING_URI") -> None:
    """Make sure that MLflow can use the store at this address, with the errors of `connect`; make a SQLite store."""
    if uri.startswith("http"):
        if _login(uri):  # requests would put a login of the file netrc in its place
            os.environ["NETRC"] = os.devnull
        _ask_server(uri, given_as)
    elif not uri.startswith("databricks"):
        from demo_lib.databases import open_database  # late: it takes a while to load

        open_database(uri)


def artifact_root(uri: str, experiment: str) -> str | None:
    """Return where a new experiment's files go: beside a SQLite store; None leaves it to a server."""
    database = sqlite_file(uri)
    return (database.parent / "artifacts" / experiment).as_uri() if database else None


def own_name(experiment: str, uri: str | None = None) -> str:
    """Return the experiment's name for you in this store or that at `uri`.

    On a server with a login, `LOGIN/` comes before a name that has no slash.
    """
    login = _login(uri)
    return f"{login}/{experiment}" if login and "/" not in experiment else experiment


def own_model_name(model: str, uri: str | None = None) -> str:
    """Return the name that the registered model has for you: on a server with a login, `LOGIN.` comes before it."""
    login = _login(uri)
    return f"{login}.{model}" if login and not model.startswith(f"{login}.") else model


@contextmanager
def signed_in(login: Login) -> Iterator[None]:
    """Send this login to servers in the block; without one, that of the environment."""
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    with restored_variables(*names):
        os.environ |= dict(zip(names, login or (), strict=False))
        yield


@dataclass(frozen=True)
class Link:
    """An address that a notebook shows as a link and a terminal as text."""

    url: str
    text: str

    def __str__(self) -> str:
        return self.url

    def _repr_html_(self) -> str:
        return f'<a href="{html.escape(self.url)}" target="_blank" rel="noopener">{html.escape(self.text)}</a>'


def ui_link(of: Run | Experiment | RegisteredModel, uri: str | None = None) -> Link:
    """Return the link to the run's, the experiment's or the registered model's page in this store's MLflow UI.

    With `uri`, a server's address, it is the page there.
    """
    uri = uri or tracking_uri()
    base = without_login(uri).rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{settings().ui_port}"
    if isinstance(of, RegisteredModel):
        return Link(f"{base}/#/models/{quote(of.name, safe='')}", f"model {of.name} in the MLflow UI")
    if isinstance(of, Run):
        page, text = f"{of.info.experiment_id}/runs/{of.info.run_id}", f"run {of.info.run_name}"
    else:
        page, text = f"{of.experiment_id}/runs", f"experiment {of.name}"
    # Without workflowType a fresh browser opens the page for generative AI.
    return Link(f"{base}/#/experiments/{page}?workflowType=machine_learning", f"{text} in the MLflow UI")


def metric_histories(run_ids: Sequence[str], metric: str) -> dict[str, list[Metric]]:
    """Return a server's histories of the metric by run, for a hundred runs at most, by one request.

    There are none if they have too many points for one answer.
    """
    creds, path = get_default_host_creds(tracking_uri()), "/ajax-api/2.0/mlflow/metrics/get-history-bulk"
    answer = http_request(creds, path, "GET", params={"run_id": run_ids, "metric_key": metric})
    answer.raise_for_status()
    points = answer.json()["metrics"]
    found: dict[str, list[Metric]] = {run_id: [] for run_id in run_ids}
    for point in points:
        found[point["run_id"]].append(Metric(metric, float(point["value"]), point["timestamp"], point["step"]))
    return found if len(points) < POINTS else {}


def close_stale_runs(experiment_ids: list[str]) -> None:
    """End as KILLED the runs left RUNNING by processes of this machine that are gone."""
    unfinished = f"attributes.status = 'RUNNING' AND tags.process LIKE '{socket.gethostname()}:%'"
    for run in MlflowClient().search_runs(experiment_ids, unfinished):  # one that is deleted can't be changed
        if lives(run.data.tags["process"]) is False:
            kill_run(run.info.run_id)


def kill_run(run_id: str) -> None:
    """End as KILLED a run whose process is gone, and say so in its tag `error`."""
    client = MlflowClient()
    client.set_tag(run_id, "error", "its process ended without closing the run")
    client.set_terminated(run_id, "KILLED")


def _opened_run() -> Run:
    """Return the run that `mlflow run` opened for this process."""
    with suppress(MlflowException):
        if (run := mlflow.get_run(MLFLOW_RUN_ID.get())).info.status == "RUNNING":
            return run
    what = f"MLFLOW_RUN_ID = {MLFLOW_RUN_ID.get()} is no open run of the store {without_login(tracking_uri())}"
    todo = "before it set MLFLOW_TRACKING_URI to a store's whole address, as sqlite:////home/me/mlflow.db"
    raise DemoError(f"{what}: unset MLFLOW_RUN_ID; but if this is in `mlflow run`, {todo}.")


def _login(uri: str | None = None) -> str:
    """Return the name that MLflow sends to a server, from the environment or its credentials file, or an empty one."""
    uri = uri or tracking_uri()
    return (get_default_host_creds(uri).username or "") if uri.startswith("http") else ""


def _ask_server(uri: str, given_as: str) -> None:
    """Ask once, for 4 s at most: with MLflow's default retries a wrong address takes minutes to fail."""
    shown, search = without_login(uri), "/api/2.0/mlflow/experiments/search"
    once = {"max_retries": 0, "timeout": 4, "raise_on_status": False, "json": {"max_results": 1}}
    try:
        status = http_request(get_default_host_creds(uri), search, "POST", **once).status_code
    except MlflowException:
        todo = f"start it, or correct {given_as}"
        raise DemoError(f"no MLflow server answers at {shown}: {todo}.") from None
    if status in (401, 403):
        todo = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and ask if this host name is allowed"
        raise DemoError(f"the server at {shown} refuses you ({status}): {todo}.")
    if status != 200:
        raise DemoError(f"{shown} answers {status} and is no MLflow server: correct {given_as}.")
