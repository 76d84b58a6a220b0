"""MLflow tracking: connect, provenance, runs that end truthfully, batched metrics, models, links into the UI."""

from __future__ import annotations

import copy
import html
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from demo_lib.config import ROOT, Config, DemoError, TrainConfig, settings, sqlite_file, sqlite_uri, tracking_uri
from demo_lib.processes import port_user

import git
import mlflow
import psutil
from filelock import FileLock
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Experiment, Metric, Run, ViewType
from mlflow.entities.model_registry import RegisteredModel
from mlflow.environment_variables import MLFLOW_RUN_ID
from mlflow.models.model import ModelInfo
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE
from mlflow.utils.rest_utils import http_request
from tqdm import tqdm

PACKAGES = ("mlflow", "torch", "torchvision", "optuna")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql", "databricks")


# PyTorch takes seconds to load and the batch run tracks without it: the functions that need it import it.
if TYPE_CHECKING:
    from demo_lib.data import FashionData

    from torch import Tensor, nn


class TrackingError(DemoError):
    """The tracking store can't be reached or used."""


def connect(experiment: str) -> Experiment:
    """Choose the tracking store, make the experiment the active one, close runs that died, and return the experiment.

    The store is `MLFLOW_TRACKING_URI` if set, else SQLite with artifacts beside it in the folder `store/`. A new
    SQLite store is made by one process while the others wait; a server is asked once before anything is logged.
    In a process that `mlflow run` started, the experiment is that of the run which MLflow opened for it, whatever the
    name: `mlflow.start_run` goes on in that run. With a login to a server, it is one of your own, see `own_name`.

    Raises:
        TrackingError: the server doesn't answer, or the store or the experiment can't be used.
    """
    database = sqlite_file(open_store())
    location = (_artifact_root(database) / experiment).as_uri() if database else None
    found = _project_experiment() or _get_or_create(own_name(experiment), location)
    mlflow.set_experiment(experiment_id=found.experiment_id)
    close_stale_runs([found.experiment_id])
    return found


def open_store() -> str:
    """Choose the tracking store as `connect` does, without an experiment, and return its address.

    Raises:
        TrackingError: the address is none of a store, the server doesn't answer, or the store can't be made.
    """
    uri = tracking_uri()
    if (database := sqlite_file(uri)) is not None:
        if MLFLOW_RUN_ID.get() and not database.exists():
            raise _run_not_here()  # before a store is made that nobody asked for
        _create_store(database)
    elif uri.startswith("http"):
        _ask_server(uri)
    elif uri.partition(":")[0].partition("+")[0] not in DATABASES:
        raise TrackingError(
            f"MLFLOW_TRACKING_URI = {uri!r} is no store: set it to a server's http address, to sqlite:// and the path "
            "of a file or to another database's address, or unset it."
        )
    mlflow.set_tracking_uri(uri)
    return uri


def own_name(experiment: str) -> str:
    """Return the name that the experiment has for you: on a server with a login, `LOGIN/` comes before it.

    A name with a slash is taken as it is, so that others' experiments can be named.
    """
    login = _login()
    return f"{login}/{experiment}" if login and "/" not in experiment else experiment


def own_model_name(model: str) -> str:
    """Return the name that the registered model has for you: on a server with a login, `LOGIN.` comes before it."""
    login = _login()
    return f"{login}.{model}" if login and not model.startswith(f"{login}.") else model


def provenance(data: FashionData | None = None, config: TrainConfig | None = None) -> dict[str, str]:
    """Return the tags that say where a run came from: source, commit, versions, data, device, seed, process.

    The source is the connected lesson's notebook, or the command line; MLflow has recorded that of a run which
    `mlflow run` opened. Parts that are unknown are left out.
    """
    tags = {f"{package}_version": version(package) for package in PACKAGES}
    tags |= {"python_version": platform.python_version(), "process": _this_process()}
    tags |= _source() | _commit()
    if data is not None:
        tags |= {"data_source": data.source, "data_digest": data.digest}
    if config is not None:
        from demo_lib.training import pick_device

        import torch

        tags |= {"device": str(pick_device(config)), "seed": str(config.seed)}
        tags |= {"cpu_threads": str(torch.get_num_threads())}
    if batch_id := settings().batch_id:
        tags["batch_id"] = batch_id
    return tags


@contextmanager
def truthful_status() -> Iterator[None]:
    """End the active run with the status that tells what happened; use it in the `with` that starts the run.

    Ctrl-C and SIGTERM end it KILLED (MLflow alone says FAILED, or leaves it RUNNING); any other exception ends it
    FAILED with the error in the tag `error`. The exception goes on, and SIGTERM still ends the process.
    """
    run = mlflow.active_run()
    if run is None:
        raise TrackingError("truthful_status() needs an active run: start one before it in the same `with`.")
    try:
        with signals_between_queries({signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: _Terminated}):
            yield
    except (KeyboardInterrupt, SystemExit, _Terminated) as error:
        _close_down_to(run, "KILLED", error)
        if isinstance(error, _Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        raise
    except BaseException as error:
        _close_down_to(run, "FAILED", error)
        raise


@contextmanager
def signals_between_queries(raised: Mapping[int, type[BaseException]]) -> Iterator[None]:
    """Raise the given exception when its signal comes, but never in the middle of a database query.

    A query that an exception cuts off keeps a SQLite file locked for as long as the exception's traceback lives. A
    handler of somebody else's for Ctrl-C stays; in another thread than the main one nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        if not _in_query(frame):
            _waiting.discard(signum)
            raise raised[signum]
        if signum not in _waiting:
            _waiting.add(signum)
            threading.Thread(target=_send_while_waiting, args=(signum,), daemon=True).start()

    chosen = [each for each in raised if each == signal.SIGTERM or signal.getsignal(each) == signal.default_int_handler]
    before = {signum: signal.signal(signum, handler) for signum in chosen}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
        if late := _waiting & set(before):
            _waiting.difference_update(late)
            raise raised[late.pop()]


@contextmanager
def batched_metrics(seconds: float = 2.0, size: int = 500) -> Iterator[Callable[..., None]]:
    """Give a stand-in for `mlflow.log_metrics` that sends the active run's metrics in batches, all of them at the end.

    A batch goes out after `seconds` or at `size` metrics, whichever comes first, so that the UI stays live.
    """
    run_id, pending = mlflow.active_run().info.run_id, []
    client, sent = MlflowClient(), time.monotonic()

    def flush() -> None:
        nonlocal sent
        while pending:
            client.log_batch(run_id, metrics=pending[:1000])  # MLflow's limit for one call
            del pending[:1000]
        sent = time.monotonic()

    def log_metrics(metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        pending.extend(Metric(key, value, now, step) for key, value in metrics.items())
        if len(pending) >= size or time.monotonic() - sent > seconds:
            flush()

    try:
        yield log_metrics
    finally:
        flush()


def log_model(model: nn.Module, name: str, example: Tensor, **kwargs: Any) -> ModelInfo:
    """Log the model with its signature, an input example and pinned requirements, and return what MLflow made of it.

    `example` holds at least two images, float32 of shape (B, 1, 28, 28): torch.export freezes a batch of one.
    """
    model = copy.deepcopy(model).cpu().eval()
    requirements = [f"{package}=={version(package)}" for package in ("torch", "torchvision", "mlflow")]
    return mlflow.pytorch.log_model(
        model, name=name, input_example=example.numpy(), pip_requirements=requirements, **kwargs
    )


def log_config(config: Config, exclude: Collection[str] = ()) -> None:
    """Log the configuration's fields as parameters of the active run.

    `mlflow run` has logged some as they were typed, quoted for the shell, such as `true` for `True`, and MLflow
    refuses to change a parameter: those that mean the same are left as they are.

    Raises:
        TrackingError: the run has another value of a field.
    """
    run = mlflow.get_run(mlflow.active_run().info.run_id)
    fields = config.model_dump(exclude=set(exclude))
    logged = {name: " ".join(shlex.split(text)) for name, text in run.data.params.items() if name in fields}
    meant = type(config)(**config.model_dump() | logged).model_dump()
    if other := [name for name in logged if meant[name] != fields[name]]:
        raise TrackingError(
            f"run {run.info.run_id} has {other[0]} = {logged[other[0]]} already, not {fields[other[0]]}: start a run "
            "of its own."
        )
    mlflow.log_params({name: value for name, value in fields.items() if name not in logged})


def train(config: TrainConfig, experiment: str = "train", tags: Mapping[str, str] | None = None) -> Run:
    """Do in one tracked run of the experiment what lesson 01 does step by step, and return the run.

    Logs parameters, metrics, both datasets, a model summary, and the best and the last model; the best one, chosen on
    the validation split, is scored once on the test split. `tags` are added to those of `provenance`.
    """
    from demo_lib.data import batches, load_data
    from demo_lib.model import build_model, summarize
    from demo_lib.training import count_records, evaluate, fit

    connect(experiment)
    data = load_data(config)
    print(data)
    model = build_model(config)
    with (
        mlflow.start_run(tags=provenance(data, config) | dict(tags or {})) as run,
        truthful_status(),
        batched_metrics() as log_metrics,
    ):
        log_config(config)
        mlflow.log_text(summarize(model), "model_summary.txt")
        log_datasets(data)
        best, started = None, time.perf_counter()
        for record in tqdm(fit(model, data, config), total=count_records(data, config), disable=None):
            log_metrics(record.metrics, step=record.step)
            best = record if record.weights else best
        log_metrics({"fit_seconds": time.perf_counter() - started}, step=record.step)
        example = next(batches(data.test, 2))[0]
        log_model(model, "last_model", example, step=record.step)
        model.load_state_dict(best.weights)
        log_model(model, "best_model", example, step=best.step)
        test = {f"test_{name}": value for name, value in evaluate(model, data.test).items()}
        log_metrics(test, step=best.step)
    return mlflow.get_run(run.info.run_id)


def log_datasets(data: FashionData) -> None:
    """Link the active run to the training and validation images it uses, with their digests."""
    from demo_lib.data import ADDRESS

    for context, split in {"training": data.train, "validation": data.validation}.items():
        dataset = mlflow.data.from_numpy(
            split.images.numpy(), targets=split.labels.numpy(), name=data.name, source=ADDRESS
        )
        mlflow.log_input(dataset, context=context)


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
    """Return the link to the run's, the experiment's or the registered model's page in the MLflow UI.

    Experiments need `workflowType`: without it a fresh browser opens the page for generative AI.
    """
    uri = tracking_uri()
    parts = urlsplit(uri)
    base = f"http://127.0.0.1:{settings().ui_port}"
    if parts.scheme.startswith("http"):
        base = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")
    if isinstance(of, RegisteredModel):
        return Link(f"{base}/#/models/{quote(of.name, safe='')}", f"model {of.name} in the MLflow UI")
    if isinstance(of, Run):
        page, text = f"{of.info.experiment_id}/runs/{of.info.run_id}", f"run {of.info.run_name} in the MLflow UI"
    else:
        page, text = f"{of.experiment_id}/runs", f"experiment {of.name} in the MLflow UI"
    return Link(f"{base}/#/experiments/{page}?workflowType=machine_learning", text)


def serve_ui(port: int) -> int:
    """Serve the MLflow UI on the local store until Ctrl-C, and return the exit code.

    Raises:
        TrackingError: the port is in use, or the runs are on a server that has its own UI.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        raise TrackingError(f"the runs are on a server: open {uri} in a browser.")
    if (user := port_user(port)) != "nobody":
        what = "The MLflow UI already runs there" if user == "mlflow" else "Another program listens there"
        raise TrackingError(f"port {port} is in use. {what}: open http://127.0.0.1:{port} or choose another --port.")
    database = sqlite_file(uri)
    options = []
    if database is not None:
        _create_store(database)
        options = ["--artifacts-destination", str(_artifact_root(database))]
    print(f"MLflow UI on http://127.0.0.1:{port}/#/experiments (stop it with Ctrl-C)", flush=True)
    # One worker and no job runner: two processes instead of a dozen.
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level=warning"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return subprocess.call([*command, "--backend-store-uri", uri, *options], env=environment)


def close_stale_runs(experiment_ids: list[str]) -> list[str]:
    """End as KILLED the runs left RUNNING by processes of this machine that are gone, and return their ids."""
    client = MlflowClient()
    unfinished = f"attributes.status = 'RUNNING' AND tags.process LIKE '{socket.gethostname()}:%'"
    closed = []
    for run in client.search_runs(experiment_ids, unfinished, ViewType.ALL):
        if died_here(run):
            client.set_tag(run.info.run_id, "error", "its process ended without closing the run")
            client.set_terminated(run.info.run_id, "KILLED")
            closed.append(run.info.run_id)
    return closed


def died_here(run: Run) -> bool:
    """Whether the run's process was on this machine and is gone; its start tells it from a later one of that pid."""
    host, pid, start = run.data.tags["process"].rsplit(":", 2)
    try:
        return host == socket.gethostname() and abs(psutil.Process(int(pid)).create_time() - float(start)) >= 2
    except psutil.NoSuchProcess:
        return True


class _Terminated(BaseException):
    """SIGTERM, raised so that `with` blocks and generators end before the process does."""


_waiting: set[int] = set()  # signals that met a query and are to be raised after it


def _send_while_waiting(signum: int) -> None:
    """Send the signal to the main thread until it has been raised there.

    Sent once, it could come between the start of a blocking call and the wait in it, which it then would not end.
    """
    main = threading.main_thread().ident
    while True:
        time.sleep(0.02)
        if signum not in _waiting:
            return
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, signum)  # to any other thread, it would not end a blocking call of the main one
        else:
            signal.raise_signal(signum)


def _in_query(frame: FrameType | None) -> bool:
    """Whether the frame or one that called it is SQLAlchemy's."""
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("sqlalchemy."):
            return True
        frame = frame.f_back
    return False


def _close_down_to(run: Run, status: str, error: BaseException) -> None:
    """End the run, and the runs nested in it that are still open, as `status`."""
    text = f"{type(error).__name__.lstrip('_')}: {error}".rstrip(": ")
    MlflowClient().set_tag(run.info.run_id, "error", text[:5000])
    while (active := mlflow.active_run()) is not None:
        mlflow.end_run(status)
        if active.info.run_id == run.info.run_id:
            return


def _project_experiment() -> Experiment | None:
    """Return the experiment of the run that `mlflow run` opened for this process, if it did."""
    run_id = MLFLOW_RUN_ID.get()
    if not run_id:
        return None
    try:
        opened = mlflow.get_run(run_id).info
        if opened.status != "RUNNING":
            raise TrackingError(f"the run {run_id} that MLFLOW_RUN_ID names has ended: unset MLFLOW_RUN_ID.")
        return mlflow.get_experiment(opened.experiment_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise _run_not_here() from None


def _run_not_here() -> TrackingError:
    return TrackingError(
        f"the run {MLFLOW_RUN_ID.get()} that `mlflow run` opened is not in the store {tracking_uri()}: before "
        "`mlflow run`, set MLFLOW_TRACKING_URI to a store's whole address, such as "
        "sqlite:////home/me/demo/store/mlflow.db."
    )


def _source() -> dict[str, str]:
    if MLFLOW_RUN_ID.get():
        return {}
    experiment = MlflowClient().get_experiment(mlflow.tracking.fluent._get_experiment_id())
    notebook = ROOT / "notebooks" / f"{experiment.name.rpartition('/')[2]}.ipynb"
    if notebook.is_file():
        return {MLFLOW_SOURCE_NAME: f"notebooks/{notebook.name}", MLFLOW_SOURCE_TYPE: "NOTEBOOK"}
    program, *arguments = sys.argv
    if Path(program).name == "__main__.py":
        program = f"python -m {Path(program).parent.name}"
    return {MLFLOW_SOURCE_NAME: " ".join([program, *arguments]), MLFLOW_SOURCE_TYPE: "LOCAL"}


def _commit() -> dict[str, str]:
    try:
        repository = git.Repo(ROOT)
        return {MLFLOW_GIT_COMMIT: repository.head.commit.hexsha, "git_dirty": str(repository.is_dirty()).lower()}
    except (git.exc.GitError, ValueError, OSError):  # no repository, no commit yet, no git, or not ours to read
        return {}


def _this_process() -> str:
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.0f}"


def _login() -> str:
    """Return the user name that MLflow sends to the server, from the environment or its credentials file."""
    uri = tracking_uri()
    return (get_default_host_creds(uri).username or "") if uri.startswith("http") else ""


def _artifact_root(database: Path) -> Path:
    return database.parent / "artifacts"


def _create_store(database: Path) -> None:
    """Make the database under another name and rename it: a store is there whole or not at all.

    MLflow's own first start migrates step by step, and processes that start together break each other's migrations.
    """
    if database.is_file():
        return
    if database.is_dir():
        raise TrackingError(f"the store {database} is a folder: MLFLOW_TRACKING_URI must name a file in it.")
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # here: a second that a server's user is spared

    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(database.with_name(f".{database.name}.lock")):
            if not database.exists():
                partial = database.with_name(f".{database.name}.partial")
                partial.unlink(missing_ok=True)
                SqlAlchemyStore(sqlite_uri(partial), _artifact_root(database).as_uri())._dispose_engine()
                partial.replace(database)
    except OSError as error:
        raise TrackingError(
            f"the store {database} can't be made ({error.strerror}): set DEMO_HOME or MLFLOW_TRACKING_URI to a place "
            "that can be written."
        ) from None


def _ask_server(uri: str) -> None:
    """Ask once, for 4 s at most: with MLflow's default retries a wrong address takes minutes to fail."""
    shown = urlsplit(uri)._replace(netloc=urlsplit(uri).netloc.rpartition("@")[2]).geturl()
    try:
        answer = http_request(
            get_default_host_creds(uri),
            "/api/2.0/mlflow/experiments/search",
            "POST",
            max_retries=0,
            timeout=4,
            raise_on_status=False,
            json={"max_results": 1},
        )
    except MlflowException:
        raise TrackingError(
            f"no MLflow server answers at {shown}: start it, or correct or unset MLFLOW_TRACKING_URI."
        ) from None
    if answer.status_code in (401, 403):
        raise TrackingError(
            f"the server at {shown} refuses you ({answer.status_code}): set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, and ask who runs it whether this host name is allowed."
        )
    if answer.status_code != 200:
        raise TrackingError(
            f"{shown} answers {answer.status_code} and is no MLflow server: correct MLFLOW_TRACKING_URI."
        )


def _get_or_create(name: str, location: str | None) -> Experiment:
    client = MlflowClient()
    try:
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                found = client.get_experiment(client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                found = client.get_experiment_by_name(name)  # another process was faster
    except MlflowException as error:
        raise TrackingError(f"the store {tracking_uri()} can't be used: {error.message}") from None
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} was deleted: restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}`."
        )
    return found
