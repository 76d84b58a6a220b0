"""Run lessons headless through papermill: in parallel, tracked in MLflow, with a report that is true.

A batch is one parent run with a child run for each job. Its plan is the parent's artifact `batch.json` before the first
job starts, and the parent's run id is the batch's: by it `resume` goes on with a batch that ended in whatever way.
"""

import csv
import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from demo_lib.config import DemoError, settings
from demo_lib.identity import lives
from demo_lib.ops.cluster import cluster
from demo_lib.ops.execution import reopen, run_here
from demo_lib.ops.jobs import Job, dump, make_folders, refuse_changed
from demo_lib.ops.processes import PYTHON
from demo_lib.ops.records import PLAN, await_end, fetch, is_here, planned, recall
from demo_lib.ops.remote import run_on_cluster

from filelock import FileLock

if TYPE_CHECKING:
    from distributed import Client
    from mlflow.entities import Run

TABLE = "jobs.csv"
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

    make_folders(jobs)
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
    from demo_lib.store import close_stale_runs, open_store
    from demo_lib.tracking import provenance, truthful_status

    import mlflow

    open_store()
    run_id = find_run(batch_id).info.run_id
    os.environ.pop("MLFLOW_RUN_ID", None)  # of a run that `mlflow run` opened, in which MLflow would go on
    folder = settings().home / "store"
    folder.mkdir(parents=True, exist_ok=True)
    with cluster(dask) as client:
        with FileLock(folder / ".resume.lock", timeout=60):  # two would both find that nobody runs it
            parent = mlflow.get_run(run_id)
            mlflow.set_experiment(experiment_id=parent.info.experiment_id)
            jobs = planned(parent)
            _refuse_running(parent)
            recall(parent, jobs)
            make_folders(jobs)
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


def _work(parent: "Run", jobs: Sequence[Job], workers: int, client: "Client | None") -> None:
    """Run the jobs that have not finished, in the active run, which is their parent, and record what came of all."""
    import mlflow

    run_id = parent.info.run_id
    again = f"{PYTHON} -m demo_lib run --resume {run_id}" + (f" --dask {client.scheduler.address}" if client else "")
    print(f"batch {run_id}", flush=True)
    try:
        if client:
            run_on_cluster(parent, _left(jobs), client)
        else:
            run_here(parent, _left(jobs), workers)
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
