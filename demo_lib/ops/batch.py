"""Run lessons headless through papermill: in parallel, tracked in MLflow, with a report that is true.

A batch is one parent run with a child run for each job. Its plan is the parent's artifact `batch.json` before the first
job starts, and the parent's run id is the batch's: by it `resume` goes on with a batch that ended in whatever way.
"""

import csv
import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from demo_lib.config import DemoError, settings, tracking_uri
from demo_lib.identity import lives
from demo_lib.ops.execution import Batch, Kernels, reopen, run_job
from demo_lib.ops.jobs import Job, dump, load, refuse_changed
from demo_lib.ops.processes import PYTHON

import joblib
from filelock import FileLock

if TYPE_CHECKING:
    from mlflow.entities import Run

PLAN, TABLE = "batch.json", "jobs.csv"
WIDE = 40  # characters of a value in the terminal's table


def run(jobs: Sequence[Job], workers: int = 0) -> None:
    """Run the jobs, `workers` at a time (0: one a core), tracked in the experiment `batch`, and print their table.

    Each job's `status`, `seconds` and `error` tell what came of it. Ctrl-C and SIGTERM end the kernels, and all runs as
    KILLED; the exception goes on. A folder for an executed notebook that can't be made is a DemoError.
    """
    from demo_lib.store import connect
    from demo_lib.tracking import provenance, truthful_status

    import mlflow

    _make_folders(jobs)
    connect("batch")
    with mlflow.start_run(run_name=f"batch of {len(jobs)}", tags=provenance()) as parent, truthful_status():
        mlflow.set_tag("batch_id", parent.info.run_id)
        mlflow.log_dict(dump(jobs), PLAN)
        lessons = " ".join(dict.fromkeys(job.notebook.stem for job in jobs))
        mlflow.log_params({"lessons": lessons, "jobs": len(jobs)})
        _work(parent, jobs, workers)


def resume(batch_id: str, workers: int = 0) -> list[Job]:
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
    with FileLock(folder / ".resume.lock", timeout=60):  # two would both find that nobody runs it
        parent = mlflow.get_run(run_id)
        mlflow.set_experiment(experiment_id=parent.info.experiment_id)
        jobs = _planned(parent)
        _refuse_running(parent)
        _recall(parent, jobs)
        if parent.info.status == "FINISHED":
            print(f"batch {run_id} is finished: nothing is left to do.", table(jobs), sep="\n")
            return jobs
        refuse_changed(_left(jobs))
        _make_folders(_left(jobs))
        reopen(run_id, {"process": provenance()["process"]})
    close_stale_runs([parent.info.experiment_id])
    with mlflow.start_run(run_id), truthful_status():
        _work(parent, jobs, workers)
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


def _work(parent: "Run", jobs: Sequence[Job], workers: int) -> None:
    """Run the jobs that have not finished, in the active run, which is their parent, and record what came of all."""
    import mlflow

    run_id = parent.info.run_id
    again = f"{PYTHON} -m demo_lib run --resume {run_id}"
    print(f"batch {run_id}", flush=True)
    try:
        _run_all(parent, _left(jobs), workers)
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


def _run_all(parent: "Run", jobs: Sequence[Job], workers: int) -> None:
    from demo_lib.tracking import provenance

    workers = min(max(workers, 0) or joblib.cpu_count(), max(len(jobs), 1))
    run_id, kernels = parent.info.run_id, Kernels()
    tags, variables = provenance() | {"batch_id": run_id}, _variables(run_id, workers)
    batch = Batch(run_id, parent.info.experiment_id, tags, variables)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run_job, job, batch, kernels) for job in jobs]
        try:
            while wait(futures, timeout=1).not_done:  # Windows delivers Ctrl-C only between waits
                pass
        except BaseException:
            kernels.end_all()
            raise
    for future in futures:
        future.result()


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


def _left(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if job.status != "FINISHED"]


def _planned(parent: "Run") -> list[Job]:
    """Return the jobs as they were planned; a run that has no plan is a DemoError."""
    import mlflow

    run_id, above = parent.info.run_id, parent.data.tags.get("mlflow.parentRunId")
    if PLAN in {each.path for each in mlflow.artifacts.list_artifacts(run_id=run_id)}:
        with suppress(ValueError):  # it was killed while it wrote
            return load(json.loads(mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/{PLAN}")))
    todo = f"give its parent's id, {above}" if above else "if it was killed before its first job, begin it again"
    raise DemoError(f"run {run_id} is no batch, or has no plan of its jobs: {todo}.")


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


def _recall(parent: "Run", jobs: Sequence[Job]) -> None:
    """Note in each job what came of it before, as its child run has it."""
    import mlflow

    nested = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    for child in mlflow.search_runs([parent.info.experiment_id], nested, output_format="list"):
        if (number := child.data.tags.get("job", "")).isdecimal():
            job = jobs[int(number)]
            job.run_id, job.error = child.info.run_id, child.data.tags.get("error", "")
            job.status = "KILLED" if child.info.status == "RUNNING" else child.info.status
            job.seconds = child.data.metrics.get("seconds", 0.0)


def _csv(jobs: Sequence[Job]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(_rows(jobs))
    return text.getvalue()
