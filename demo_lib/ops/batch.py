"""Run lessons headless through papermill: in parallel, tracked in MLflow, with a report that is true.

A batch is one parent run with a child run for each job. Its plan is the parent's artifact `batch.json` before the first
job starts, and the parent's run id is the batch's: by it `resume` goes on with a batch that ended in whatever way.
"""

import csv
import io
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from demo_lib.config import DemoError, settings, sqlite_file, tracking_uri
from demo_lib.identity import lives
from demo_lib.ops.cluster import LOST, answer, cluster, submit
from demo_lib.ops.execution import Batch, Kernels, reopen, run_job, say
from demo_lib.ops.jobs import Job, dump, refuse_changed
from demo_lib.ops.processes import PYTHON
from demo_lib.ops.records import (
    PLAN,
    await_end,
    fetch,
    find_notebook,
    is_here,
    note_failure,
    planned,
    recall,
    send_notebooks,
)

import joblib
from filelock import FileLock

if TYPE_CHECKING:
    from distributed import Client, Future
    from mlflow.entities import Run

TABLE = "jobs.csv"
LOOK = 3  # seconds between two looks of a job on a cluster whether its batch still runs
WIDE = 40  # characters of a value in the terminal's table


def run(jobs: Sequence[Job], workers: int = 0, dask: str | None = None) -> None:
    """Run the jobs, `workers` at a time (0: one a core), tracked in the experiment `batch`, and print their table.

    With a scheduler's address they are tasks of a Dask cluster, which knows how many it does at a time. What they made
    comes from the store. Each job's `status`, `seconds` and `error` tell what came of it. Ctrl-C and SIGTERM end the
    kernels, and all runs as KILLED; the exception goes on. A folder for an executed notebook that can't be made, and a
    cluster that can't be used, are a DemoError.
    """
    from demo_lib.store import connect
    from demo_lib.tracking import provenance, truthful_status

    import mlflow

    _make_folders(jobs)
    with cluster(dask) as client:
        connect("batch")
        with mlflow.start_run(run_name=f"batch of {len(jobs)}", tags=provenance()) as parent, truthful_status():
            mlflow.set_tag("batch_id", parent.info.run_id)
            mlflow.log_dict(dump(jobs), PLAN)
            lessons = " ".join(dict.fromkeys(job.notebook.stem for job in jobs))
            mlflow.log_params({"lessons": lessons, "jobs": len(jobs)})
            _work(parent, jobs, workers, client)


def resume(batch_id: str, workers: int = 0, dask: str | None = None) -> list[Job]:
    """Do the jobs of a batch that have not finished, in the same runs, as `run` does; return all its jobs.

    `batch_id` is the parent's run id, or its first digits. A run that is no batch, a batch that still runs, and a
    notebook that has changed since are a DemoError.
    """
    from demo_lib.runs import find_run
    from demo_lib.store import close_stale_runs
    from demo_lib.tracking import provenance, truthful_status

    import mlflow

    _open_store()
    run_id = find_run(batch_id).info.run_id
    folder = settings().home / "store"
    folder.mkdir(parents=True, exist_ok=True)
    with cluster(dask) as client:
        with FileLock(folder / ".resume.lock", timeout=60):  # two would both find that nobody runs it
            parent = mlflow.get_run(run_id)
            mlflow.set_experiment(experiment_id=parent.info.experiment_id)
            jobs = planned(parent)
            _refuse_running(parent)
            recall(parent, jobs)
            _make_folders(jobs)
            if parent.info.status == "FINISHED":
                _fetch_missing(jobs)
                print(f"batch {run_id} is finished: nothing is left to do.", table(jobs), sep="\n")
                return jobs
            refuse_changed(_left(jobs))
            reopen(run_id, {"process": provenance()["process"]})
        close_stale_runs([parent.info.experiment_id])
        with mlflow.start_run(run_id), truthful_status():
            await_end(parent)  # of jobs on a cluster, whose coordinator was killed
            recall(parent, jobs)
            _fetch_missing(jobs)
            _work(parent, jobs, workers, client)
    return jobs


def join(batch_id: str, number: str, process: str) -> None:
    """Do one job of a batch that another process runs, whose identity is given, unless it is finished.

    What comes of it is in its run alone. When the batch ends, or another process runs it, the job is interrupted.
    """
    from demo_lib.tracking import terminable

    import mlflow
    from mlflow import MlflowException

    _open_store()
    parent = mlflow.get_run(batch_id)
    job = planned(parent)[int(number)]

    def follow() -> None:
        with suppress(MlflowException):  # a server that does not answer says nothing of the batch
            now = mlflow.get_run(batch_id)
            if (now.info.status, now.data.tags.get("process")) != ("RUNNING", process):
                raise KeyboardInterrupt

    follow()
    recall(parent, [job])
    with TemporaryDirectory() as folder, terminable():
        job.notebook = find_notebook(parent, job, Path(folder))
        job.output = Path(folder, "done", job.output.name)
        _make_folders([job])
        _run_here(parent, _left([job]), 1, follow, LOOK)


def table(jobs: Sequence[Job]) -> str:
    """Return the report of a batch as text: what tells the jobs apart, status and seconds, then the errors."""
    shown = [[" ".join(str(each).split())[:WIDE] for each in row[:-1]] for row in _rows(jobs)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join([*lines, *(f"\n{job.name}: {job.error}" for job in jobs if job.error)])


def _rows(jobs: Sequence[Job]) -> list[list[Any]]:
    """Return the table's header and its rows."""
    names = list(dict.fromkeys(name for job in jobs for name in job.apart))
    header = [*names, "status", "seconds", "error"]
    return [
        header,
        *([*(job.apart.get(name, "") for name in names), job.status, round(job.seconds, 1), job.error] for job in jobs),
    ]


def _open_store() -> None:
    from demo_lib.store import open_store

    open_store()
    os.environ.pop("MLFLOW_RUN_ID", None)  # of a run that `mlflow run` opened, in which MLflow would go on


def _work(parent: "Run", jobs: Sequence[Job], workers: int, client: "Client | None") -> None:
    """Run the jobs that have not finished, in the active run, which is their parent, and record what came of all."""
    import mlflow

    run_id = parent.info.run_id
    again = f"{PYTHON} -m demo_lib run --resume {run_id}" + (f" --dask {client.scheduler.address}" if client else "")
    print(f"batch {run_id}", flush=True)
    try:
        if client:
            _run_on_cluster(parent, _left(jobs), client)
        else:
            _run_here(parent, _left(jobs), workers)
        failed = len(_left(jobs))
        mlflow.log_metric("failed_lessons", failed)
        mlflow.log_text(_csv(jobs), TABLE)
        if failed:
            mlflow.end_run("FAILED")
    except KeyboardInterrupt:
        print(f"interrupted: `{again}` goes on from here.", flush=True)
        raise
    finally:
        print(table(jobs), flush=True)
    if failed:
        print(f"\nTo try again what failed: {again}")


def _run_here(
    parent: "Run", jobs: Sequence[Job], workers: int, follow: Callable[[], None] = lambda: None, every: float = 1
) -> None:
    """Run the jobs in this process, and call `follow`, which may raise what ends them, every few seconds."""
    workers = min(max(workers, 0) or joblib.cpu_count(), max(len(jobs), 1))
    batch, kernels = _batch(parent, workers), Kernels()
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run_job, job, batch, kernels) for job in jobs]
        try:
            while wait(futures, timeout=every).not_done:  # Windows delivers Ctrl-C only between waits
                follow()
        except BaseException:
            kernels.end_all()
            raise
    for future in futures:
        future.result()


def _run_on_cluster(parent: "Run", jobs: Sequence[Job], client: "Client") -> None:
    import mlflow

    batch, variables = _batch(parent, 1), {"MLFLOW_TRACKING_URI": tracking_uri()}
    if (storage := settings().storage) and not sqlite_file(storage):
        variables["DEMO_STORAGE"] = storage
    send_notebooks(jobs)
    joins = [["run", "--join", batch.run_id, str(job.number), batch.tags["process"]] for job in jobs]
    tasks = {submit(client, words, variables): job for words, job in zip(joins, jobs, strict=True)}
    try:
        while tasks:
            time.sleep(0.3)
            for task in [each for each in tasks if each.done()]:
                _take(parent, tasks[task], batch, task)
                del tasks[task]
    except BaseException as error:
        client.cancel([*tasks])  # only those that have not begun; the others look whether the batch runs
        mlflow.end_run("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        print("waiting until the cluster's workers have ended their jobs", flush=True)
        await_end(parent)
        recall(parent, jobs)
        raise


def _take(parent: "Run", job: Job, batch: Batch, task: "Future") -> None:
    """Note what came of a job on the cluster, and bring its executed notebook here; some errors end the batch."""
    if task.cancelled():
        raise DemoError(f"{LOST}: look whether it runs, then go on with --resume.")
    if isinstance(error := task.exception(), DemoError):
        raise error
    if problem := answer(task):
        await_end(parent, job, 20)  # it may be about to: what a killed worker has started ends after it
        recall(parent, [job])
        note_failure(job, batch, problem)
    else:
        recall(parent, [job])
        fetch(job)
    say(job)


def _batch(parent: "Run", workers: int) -> Batch:
    from demo_lib.tracking import provenance

    run_id = parent.info.run_id
    return Batch(run_id, parent.info.experiment_id, provenance() | {"batch_id": run_id}, _variables(run_id, workers))


def _variables(run_id: str, workers: int) -> dict[str, str]:
    """Return the variables of the kernels, which say that their runs are this batch's."""
    return {
        "MLFLOW_RUN_ID": "",  # a run that `mlflow run` opened is the batch's, not a lesson's
        "MLFLOW_TRACKING_URI": tracking_uri(),  # absolute: a kernel works in the notebook's folder
        "DEMO_HOME": str(settings().home),
        "DEMO_BATCH_ID": run_id,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, joblib.cpu_count() // workers)),
    }


def _make_folders(jobs: Sequence[Job]) -> None:
    for folder in {job.output.parent for job in jobs}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DemoError(f"the folder {folder} can't be made ({error.strerror}): choose another --output.") from None


def _fetch_missing(jobs: Sequence[Job]) -> None:
    """Bring what jobs made on a cluster after their coordinator was killed."""
    for job in jobs:
        if job.status == "FINISHED" and not is_here(job):
            fetch(job)


def _left(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.status != "FINISHED"]


def _refuse_running(parent: "Run") -> None:
    process = parent.data.tags.get("process", "")
    if parent.info.status == "RUNNING" and (alive := lives(process)) is not False:
        what = (
            f"batch {parent.info.run_id} still runs, in process {process.split(':')[-2]}: wait for its end, or end it"
        )
        if alive is None:
            host, end = process.partition(":")[0], f"MlflowClient().set_terminated('{parent.info.run_id}', 'KILLED')"
            what = (
                f"batch {parent.info.run_id} may still run on {host}: resume it there or, if that is gone, call {end}"
            )
        raise DemoError(f"{what}.")


def _csv(jobs: Sequence[Job]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(_rows(jobs))
    return text.getvalue()
