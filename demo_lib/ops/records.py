"""What the store knows of a batch: the plan of its jobs, what came of each, and their executed notebooks."""

import json
import shutil
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from demo_lib.config import LESSONS, DemoError, whole_file
from demo_lib.ops.execution import Batch
from demo_lib.ops.jobs import Job, digest, load

if TYPE_CHECKING:
    from mlflow.entities import Run

PLAN, NOTEBOOKS = "batch.json", "notebooks"


def planned(parent: "Run") -> list[Job]:
    """Return the jobs as they were planned; a run that has no plan is a DemoError."""
    import mlflow

    run_id, above = parent.info.run_id, parent.data.tags.get("mlflow.parentRunId")
    if PLAN in {each.path for each in mlflow.artifacts.list_artifacts(run_id=run_id)}:
        with suppress(ValueError):  # it was killed while it wrote
            return load(json.loads(mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/{PLAN}")))
    todo = f"give its parent's id, {above}" if above else "if it was killed before its first job, begin it again"
    raise DemoError(f"run {run_id} is no batch, or has no plan of its jobs: {todo}.")


def recall(parent: "Run", jobs: Sequence[Job]) -> None:
    """Note in each job what came of it, as its child run has it."""
    known = {str(job.number): job for job in jobs}
    found = _children(parent, f"AND tags.job = '{jobs[0].number}'" if len(jobs) == 1 else "")
    # Of two children of one job, which is rare, the finished or the later one counts.
    for child in sorted(found, key=lambda run: (run.info.status == "FINISHED", run.info.start_time)):
        if job := known.get(child.data.tags.get("job", "")):
            job.status = "KILLED" if child.info.status == "RUNNING" else child.info.status
            job.run_id, job.error = child.info.run_id, child.data.tags.get("error", "")
            if job.status == "FINISHED":  # the error is that of an earlier try
                job.error = ""
            job.seconds, job.ended = child.data.metrics.get("seconds", 0.0), (child.info.end_time or 0) / 1000


def await_end(parent: "Run", job: Job | None = None, seconds: float = 60) -> None:
    """Wait until the job, or none of the batch, runs; after so long their runs are ended: their machine is gone."""
    from demo_lib.store import kill_run

    chosen = "AND attributes.status = 'RUNNING'" + (f" AND tags.job = '{job.number}'" if job else "")
    deadline, said = time.monotonic() + seconds, False
    while left := _children(parent, chosen):
        if time.monotonic() > deadline:
            for run in left:
                kill_run(run.info.run_id)
            return
        if not said:
            print(f"waiting for jobs that may still run: {len(left)}", flush=True)
        said = True
        time.sleep(0.5)


def note_failure(job: Job, batch: Batch, error: str) -> None:
    """Note, in the job and in its run, why it failed in a process that could not note it."""
    import mlflow

    tags = batch.tags | {"job": str(job.number), "error": error[:5000]}
    nested = {"experiment_id": batch.experiment_id, "parent_run_id": batch.run_id, "nested": True}
    with mlflow.start_run(job.run_id or None, run_name=job.name, tags=tags, **nested) as child:
        mlflow.log_params(job.params)
        mlflow.end_run("FAILED")
    job.run_id, job.status, job.error = child.info.run_id, "FAILED", error


def send_notebooks(jobs: Iterable[Job]) -> None:
    """Log to the active run the notebooks that are none of this project's lessons, for `find_notebook`."""
    import mlflow

    for notebook in {job.notebook for job in jobs if job.notebook.parent != LESSONS}:
        mlflow.log_artifact(str(notebook), NOTEBOOKS)


def find_notebook(parent: "Run", job: Job, folder: Path) -> Path:
    """Return the job's notebook, at its own place or else, as it was sent, in the folder.

    A lesson that is another one here is a DemoError.
    """
    import mlflow

    if job.notebook.is_file() and digest(job.notebook) == job.digest:
        return job.notebook
    run_id, sent = parent.info.run_id, f"{NOTEBOOKS}/{job.notebook.name}"
    if sent not in {each.path for each in mlflow.artifacts.list_artifacts(run_id=run_id, artifact_path=NOTEBOOKS)}:
        what = f"the batch runs another {job.notebook.name} than {job.notebook.parent} of {socket.gethostname()} has"
        raise DemoError(f"{what}: the checkouts differ, bring both to the same commit.")
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=sent, dst_path=str(folder)))


def fetch(job: Job) -> None:
    """Bring the job's executed notebook and its page from its run to their place; that this can't be fails the job."""
    import mlflow

    try:
        there = {each.path for each in mlflow.artifacts.list_artifacts(run_id=job.run_id)}
        with TemporaryDirectory() as folder:
            for path in {job.output.with_suffix(".html"), job.output}:
                if path.name in there:
                    brought = mlflow.artifacts.download_artifacts(
                        run_id=job.run_id, artifact_path=path.name, dst_path=folder
                    )
                    with whole_file(path) as partial:
                        shutil.copyfile(brought, partial)
    except Exception as error:  # of a disk, MLflow, or the library of a bucket; `resume` fetches again
        job.status, job.error = "FAILED", f"its executed notebook could not be kept: {error}"


def is_here(job: Job) -> bool:
    """Whether the job's executed notebook lies in its place, and none from before; clocks may differ by a minute."""
    return job.output.is_file() and job.output.stat().st_mtime > job.ended - 60


def _children(parent: "Run", where: str) -> list["Run"]:
    import mlflow

    nested = f"tags.mlflow.parentRunId = '{parent.info.run_id}' {where}"
    return mlflow.search_runs([parent.info.experiment_id], nested, output_format="list")
