"""A batch on a Dask cluster: each job is a command that joins the batch, and what comes of it goes through the store.

Dask can't stop a task that runs, so that the command looks whether its batch does.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from demo_lib.config import DemoError, settings, sqlite_file, tracking_uri
from demo_lib.ops.cluster import LOST, answer, submit
from demo_lib.ops.execution import Batch, describe, run_here, say
from demo_lib.ops.jobs import Job, make_folders
from demo_lib.ops.records import await_end, fetch, find_notebook, note_failure, planned, recall, send_notebooks

if TYPE_CHECKING:
    from distributed import Client, Future
    from mlflow.entities import Run

LOOK = 3  # seconds between two looks of a job whether its batch still runs


def run_on_cluster(parent: "Run", jobs: Sequence[Job], client: "Client") -> None:
    """Run the jobs, whose parent is the active run, as tasks of the cluster, and take what they made from the store.

    A job that Dask gives up is FAILED, and the others go on. What ends this ends all of them, as they look whether the
    parent runs. A scheduler that is gone, and a worker that can't open the store, a file, are a DemoError.
    """
    import mlflow

    batch, variables = describe(parent, 1), {"MLFLOW_TRACKING_URI": tracking_uri()}
    if (storage := settings().storage) and not sqlite_file(storage):
        variables["DEMO_STORAGE"] = storage
    tasks: dict[Future, Job] = {}
    try:
        send_notebooks(jobs)
        for job in jobs:
            words = ["run", "--join", batch.run_id, str(job.number), batch.tags["process"]]
            tasks[submit(client, words, variables)] = job
        while tasks:
            time.sleep(0.3)
            for task in [each for each in tasks if each.done()]:
                _take(parent, tasks[task], batch, task)
                del tasks[task]
    except BaseException as error:
        client.cancel([*tasks])  # only those that have not begun; the others look whether the batch runs
        mlflow.end_run("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        await_end(parent)
        recall(parent, jobs)
        raise


def join(batch_id: str, number: str, process: str) -> None:
    """Do one job of a batch that another process runs, whose identity is given, unless it is finished.

    What comes of it is in its run alone. When the batch ends, or another process runs it, the job is interrupted.
    """
    from demo_lib.store import open_store
    from demo_lib.tracking import terminable

    import mlflow
    from mlflow import MlflowException

    open_store()
    parent = mlflow.get_run(batch_id)
    job = planned(parent)[int(number)]

    def follow() -> None:
        with suppress(MlflowException):  # a server that does not answer says nothing of the batch
            now = mlflow.get_run(batch_id)
            if (now.info.status, now.data.tags.get("process")) != ("RUNNING", process):
                raise KeyboardInterrupt

    follow()
    await_end(parent, job, 30)  # another worker, told to end, may be in it
    recall(parent, [job])
    if job.status == "FINISHED":  # by a worker that died before it could say so
        return
    with TemporaryDirectory() as folder, terminable():
        job.notebook = find_notebook(parent, job, Path(folder))
        job.output = Path(folder, "done", job.output.name)
        make_folders([job])
        run_here(parent, [job], 1, follow, LOOK)


def _take(parent: "Run", job: Job, batch: Batch, task: "Future") -> None:
    """Note what came of a job on the cluster, and bring its executed notebook here; some errors end the batch."""
    if task.cancelled():
        raise DemoError(f"{LOST}: when it runs, `run --resume {batch.run_id}` goes on.")
    if isinstance(error := task.exception(), DemoError):
        raise error
    if problem := answer(task):
        await_end(parent, job, 20)  # it may be about to: what a killed worker has started ends after it
    recall(parent, [job])
    if problem and job.status != "FINISHED":
        note_failure(job, batch, problem)
    else:
        fetch(job)
    say(job)
