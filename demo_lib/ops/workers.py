"""A study whose trials are done by several processes at once; each is a command that joins the study."""

import os
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

from demo_lib import tuning
from demo_lib.config import DemoError, TuneConfig, settings, tracking_uri
from demo_lib.data import load_data
from demo_lib.ops.processes import OwnedProcess
from demo_lib.store import close_stale_runs, open_store
from demo_lib.study import MEMORY, done, equip, open_storage, return_to, running
from demo_lib.tracking import terminable

import joblib
import mlflow
import optuna
from mlflow.entities import Run


def tune(config: TuneConfig, experiment: str = "tune", storage: str | None = None) -> Run:
    """Do as `tuning.tune`, with `config.workers` processes; several can't share a study in memory."""
    if config.workers == 1:
        return tuning.tune(config, experiment, storage)
    if storage == MEMORY:
        raise DemoError("a study in memory can't be shared by processes: keep 1 worker, or give another storage.")
    command = [sys.executable, "-m", "demo_lib", "tune", "--join", config.study]
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, joblib.cpu_count() // config.workers)),
        "MLFLOW_TRACKING_URI": tracking_uri(),
        "DEMO_HOME": str(settings().home),
        "DEMO_STORAGE": storage or settings().storage,  # not on the command line: it may hold a password
    }

    def work(study: optuna.Study, config: TuneConfig, data: object) -> Generator[None]:
        count = min(config.workers, config.trials - len(done(study) + running(study)))
        workers = [OwnedProcess(command, subprocess.DEVNULL, environment) for _ in range(count)]
        try:
            while any(worker.exit_code is None for worker in workers):
                time.sleep(0.3)
                optuna.storages.fail_stale_trials(study)
                yield
        finally:
            with ThreadPoolExecutor() as pool:  # all at once: each has its trial's run to close
                list(pool.map(OwnedProcess.stop, workers))
            # A worker that was stopped in `mlflow.start_run` has a run that its trial does not know.
            close_stale_runs([mlflow.active_run().info.experiment_id])

    return tuning.tune(config, experiment, storage, work)


def join(name: str, storage: str | None = None) -> None:
    """Do trials of a study that `tune` has begun, here or on another machine, until it has its number of them.

    A study that nobody has begun, or whose parent run is gone, is a DemoError.
    """
    open_store()
    try:
        study = optuna.load_study(study_name=name, storage=open_storage(storage))
        config, parent_run_id = TuneConfig(**study.user_attrs["config"]), study.user_attrs["parent_run_id"]
    except KeyError:
        raise DemoError(f"no study {name!r} has begun: begin it with `tune --study`, or correct --storage.") from None
    equip(study, config, alone=False)
    return_to(parent_run_id)
    with terminable():
        list(tuning.do_trials(study, config, load_data(config.train_config())))
