"""A study whose trials are done by several processes at once; each is a command that joins the study."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from demo_lib import tuning
from demo_lib.config import DemoError, TuneConfig, settings, tracking_uri
from demo_lib.ops.processes import OwnedProcess
from demo_lib.store import close_stale_runs
from demo_lib.study import MEMORY, close_dead, done, running

import mlflow
import optuna
from mlflow.entities import Run


def tune(config: TuneConfig, experiment: str = "tune", storage: str | None = None) -> Run:
    """Do as `tuning.tune`, with `config.workers` processes; several with a study in memory are a DemoError."""
    if config.workers == 1:
        return tuning.tune(config, experiment, storage)
    if storage == MEMORY:
        raise DemoError("a study in memory can't be shared by processes: keep 1 worker, or give another storage.")

    def work(study: optuna.Study, config: TuneConfig, data: object, show: Callable[[], None]) -> None:
        command = [sys.executable, "-m", "demo_lib", "tune", "--join", config.study]
        command += ["--storage", storage] if storage else []
        environment = os.environ | {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // config.workers)),
            "MLFLOW_TRACKING_URI": tracking_uri(),
            "DEMO_HOME": str(settings().home),
        }
        count = min(config.workers, config.trials - len(done(study) + running(study)))
        workers = [OwnedProcess(command, subprocess.DEVNULL, environment) for _ in range(count)]
        codes = [None]
        try:
            while None in codes:
                time.sleep(0.3)
                close_dead(study)
                show()
                codes = [worker.exit_code for worker in workers]
                if config.stop_on_error and {1, 2} & {*codes}:  # the codes of errors; one that was killed has another
                    raise DemoError("a trial failed, and stop_on_error is set: run with one worker to see why.")
        finally:
            with ThreadPoolExecutor() as pool:  # all at once: each has its trial's run to close
                list(pool.map(OwnedProcess.stop, workers))
            # A worker that was stopped in `mlflow.start_run` has a run that its trial does not know.
            close_stale_runs([mlflow.active_run().info.experiment_id])

    return tuning.tune(config, experiment, storage, work)
