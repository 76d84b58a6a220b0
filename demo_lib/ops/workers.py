"""A study whose trials are done by several processes at once; each is a command that joins the study."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from demo_lib import tuning
from demo_lib.config import DemoError, TuneConfig, settings, tracking_uri
from demo_lib.data import load_data
from demo_lib.ops.cluster import answer, cluster, submit
from demo_lib.ops.processes import OwnedProcess
from demo_lib.store import close_stale_runs, open_store
from demo_lib.study import GRACE, MEMORY, done, equip, is_stopped, open_storage, return_to, running, storage_address
from demo_lib.tracking import terminable

import joblib
import mlflow
import optuna
from mlflow.entities import Run
from tqdm import tqdm

if TYPE_CHECKING:
    from distributed import Client


def tune(config: TuneConfig, experiment: str = "tune", storage: str | None = None, dask: str | None = None) -> Run:
    """Do as `tuning.tune`, with `config.workers` processes: here or, by a scheduler's address, on a Dask cluster.

    With 0 workers it begins the study, and all trials are those of workers that `join` it.

    The cluster's machines need this project and a storage and a tracking server that they reach. They get the addresses
    of both and the login to the server, by Dask's own connections. A study in memory, which processes can't share, a
    cluster that does not answer, and Dask not being installed are a DemoError.
    """
    if config.workers == 1 and dask is None:
        return tuning.tune(config, experiment, storage)
    if dask and not config.workers:
        raise DemoError("--dask starts as many workers as --workers says: give 1 or more.")
    if storage == MEMORY:
        raise DemoError("a study in memory can't be shared by processes: keep 1 worker, or give another storage.")
    # Not on the command line: it may hold a password.
    environment = {"MLFLOW_TRACKING_URI": tracking_uri(), "DEMO_STORAGE": storage_address(storage)}

    def work(study: optuna.Study, config: TuneConfig, data: object) -> Generator[None]:
        count = max(1, min(config.workers, config.trials - len(done(study) + running(study))))
        if not config.workers:
            yield from _wait_for_others(study, config)
        elif client:
            yield from _work_on_cluster(client, study.study_name, count, environment)
        else:
            yield from _work_here(study.study_name, count, environment)

    with cluster(dask) as client:
        return tuning.tune(config, experiment, storage, work)


def join(name: str, storage: str | None = None) -> None:
    """Do trials of a study that `tune` has begun, here or on another machine, until it has its number of them.

    A study that nobody has begun or that was stopped, or whose parent run is gone, and other images than those of the
    process that began it, are a DemoError.
    """
    open_store()
    try:
        study = optuna.load_study(study_name=name, storage=open_storage(storage))
        config, parent_run_id = TuneConfig(**study.user_attrs["config"]), study.user_attrs["parent_run_id"]
    except KeyError:
        raise DemoError(f"no study {name!r} has begun: begin it with `tune --study`, or correct --storage.") from None
    if is_stopped(study):
        raise DemoError(f"study {name!r} was interrupted: `tune --study {name}` goes on with it, then join again.")
    equip(study, config, alone=False)
    return_to(parent_run_id)
    data = load_data(config.train_config())
    if mlflow.get_run(parent_run_id).data.tags.get("data_digest", data.digest) != data.digest:
        raise DemoError(f"this machine has other images ({data.source}) than the study: set DEMO_DATA_DIR.")
    with terminable():
        list(tuning.do_trials(study, config, data))


def _command(name: str) -> list[str]:
    return ["tune", "--join", name]


def _wait_for_others(study: optuna.Study, config: TuneConfig) -> Iterator[None]:
    busy, said = -math.inf, False
    while (left := config.trials - len(done(study))) > 0:
        if running(study):
            busy, said = time.monotonic(), False
        elif not said and time.monotonic() - busy > GRACE:
            print(
                f"trials to do: {left}; waiting for workers: `python -m demo_lib tune --join {study.study_name}`",
                flush=True,
            )
            said = True
        time.sleep(0.3)
        yield


def _work_here(name: str, count: int, environment: dict[str, str]) -> Iterator[None]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, joblib.cpu_count() // count))
    given = os.environ | environment | {"OMP_NUM_THREADS": threads, "DEMO_HOME": str(settings().home)}
    command = [sys.executable, "-m", "demo_lib", *_command(name)]
    workers = [OwnedProcess(command, subprocess.DEVNULL, given) for _ in range(count)]
    try:
        while any(worker.exit_code is None for worker in workers):
            time.sleep(0.3)
            yield
    finally:
        with ThreadPoolExecutor() as pool:  # all at once: each has its trial's run to close
            list(pool.map(OwnedProcess.stop, workers))
        # A worker that was stopped in `mlflow.start_run` has a run that its trial does not know.
        close_stale_runs([mlflow.active_run().info.experiment_id])


def _work_on_cluster(client: "Client", name: str, count: int, environment: dict[str, str]) -> Iterator[None]:
    tasks = [submit(client, _command(name), environment) for _ in range(count)]
    try:
        while not all(task.done() for task in tasks):
            time.sleep(0.3)
            yield
        for problem in sorted({answer(task) for task in tasks} - {""}):
            tqdm.write(f"a worker failed: {problem}")  # above the bar
    finally:
        client.cancel(tasks)  # only those that have not begun; an interrupt stops the study, which the others see
