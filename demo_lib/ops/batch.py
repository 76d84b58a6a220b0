"""Run lessons headless through papermill: checked first, in parallel, tracked in MLflow, with a report that is true."""

import json
import logging
import os
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from demo_lib.config import LESSONS, DemoError, lessons, settings, tracking_uri, whole_file

import joblib
import nbformat
import papermill as pm
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from pydantic import TypeAdapter, ValidationError

logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it says of an error is in the report
TYPES = {"int": int, "float": float, "str": str, "bool": bool}


@dataclass
class Job:
    """One lesson of a batch: what to run with which parameters, and what came of it."""

    lesson: str
    notebook: Path
    params: dict[str, Any]
    output: Path
    status: str = "NOT RUN"  # then RUNNING and, as MLflow calls them, FINISHED, FAILED or KILLED
    seconds: float = 0.0
    error: str = ""
    interrupted: bool = False
    kernel: KernelManager | None = None

    def stop_kernel(self) -> None:
        """End the kernel if there is one: after its exit handlers have run or, if the job is interrupted, at once."""
        kernel, self.kernel = self.kernel, None
        if kernel is not None:
            kernel.shutdown_kernel(now=self.interrupted or not kernel.is_alive())

    def fail(self, error: str) -> None:
        """Note the first reason why the job did not finish; interrupted, it was killed whatever error that caused."""
        self.status = "KILLED" if self.interrupted else "FAILED"
        self.error = "interrupted." if self.interrupted else self.error or error


def plan(names: Iterable[str], params: Mapping[str, Any], output: Path) -> list[Job]:
    """Return one job a lesson, all lessons if none is named, each with those of the parameters that it declares.

    A name is a lesson's number, file stem or path. Values may be text, as a command line gives them. An unknown lesson,
    a parameter that no chosen lesson declares, a value that is not allowed, and executed notebooks that would replace
    each other, or a notebook that is to be executed, are a DemoError.
    """
    notebooks = list(dict.fromkeys(_find(name) for name in names)) or lessons()
    outputs = [output.resolve() / notebook.name for notebook in notebooks]
    if lost := set(outputs) & {*notebooks, *LESSONS.glob("*.ipynb")}:
        raise DemoError(f"{min(lost)} would be overwritten: choose another --output.")
    small = [each.name.lower() for each in outputs]  # macOS and Windows take a.ipynb and A.ipynb for one
    if twice := [name for name in small if small.count(name) > 1]:
        raise DemoError(f"two of the notebooks are called {twice[0]}: run them apart, each with another --output.")
    declared = {}
    for notebook in notebooks:
        try:
            declared[notebook] = pm.inspect_notebook(notebook)
        except Exception as error:  # of JSON, of nbformat, of papermill
            raise DemoError(
                f"{notebook} is no notebook ({type(error).__name__}: {str(error)[:200]}): correct it."
            ) from None
    known = {name: inferred["inferred_type_name"] for each in declared.values() for name, inferred in each.items()}
    values = {}
    for name, value in params.items():
        if name not in known:
            raise DemoError(f"no chosen lesson has a parameter {name!r}; they have: {', '.join(known) or 'none'}.")
        try:
            values[name] = TypeAdapter(TYPES.get(known[name], Any)).validate_python(value)
            json.dumps(values[name], allow_nan=False)  # as it will be in the notebook
        except (ValidationError, TypeError, ValueError):
            what = {"float": "float, not nan or inf", "None": "text, number, list or mapping"}
            kind = known[name]
            raise DemoError(f"parameter {name} = {value!r} must be of type {what.get(kind, kind)}.") from None
    jobs = []
    for notebook, inferred in declared.items():
        own = {name: values[name] for name in inferred if name in values}
        jobs.append(Job(notebook.stem, notebook, own, output / notebook.name))
    return jobs


def run(jobs: Sequence[Job], workers: int = 0) -> None:
    """Run the jobs, `workers` at a time (0: one a core), tracked in the experiment `batch`.

    Each job's `status`, `seconds` and `error` tell what came of it. Ctrl-C and SIGTERM end the kernels, and all runs as
    KILLED; the exception goes on. A folder for the executed notebooks that can't be made is a DemoError.
    """
    from demo_lib.store import connect
    from demo_lib.tracking import provenance, truthful_status

    import mlflow

    folder = jobs[0].output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"the folder {folder} can't be made ({error.strerror}): choose another --output.") from None
    workers = min(max(workers, 0) or joblib.cpu_count(), len(jobs))
    environment = _environment(workers)
    connect("batch")
    tags = provenance() | {"batch_id": environment["DEMO_BATCH_ID"]}
    with mlflow.start_run(run_name=f"batch of {len(jobs)}", tags=tags) as parent, truthful_status():
        mlflow.log_params({"lessons": " ".join(job.lesson for job in jobs), "workers": workers})
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(_run_child, job, parent.info.run_id, tags, environment) for job in jobs]
            try:
                while wait(futures, timeout=1).not_done:  # Windows delivers Ctrl-C only between waits
                    pass
            except BaseException:
                for job in jobs:
                    job.interrupted = True
                    job.stop_kernel()
                raise
        for future in futures:
            future.result()
        failed = sum(job.status != "FINISHED" for job in jobs)
        mlflow.log_metric("failed_lessons", failed)
        if failed:
            mlflow.end_run("FAILED")


def table(jobs: Sequence[Job]) -> str:
    """Return the report of a batch as text: lesson, status and seconds, then the errors."""
    width = max(len(job.lesson) for job in jobs)
    lines = [f"{job.lesson:{width}}  {job.status:8}  {job.seconds:7.1f}" for job in jobs]
    errors = [f"\n{job.lesson}: {job.error}" for job in jobs if job.error]
    return "\n".join([f"{'lesson':{width}}  status    seconds", *lines, *errors])


def _find(name: str) -> Path:
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name).resolve()
    for notebook in lessons():
        if name in (notebook.stem, notebook.name, notebook.stem.split("_")[0]):
            return notebook
    raise DemoError(f"there is no lesson {name!r}; there are: {', '.join(path.stem for path in lessons())}.")


def _environment(workers: int) -> dict[str, str]:
    """Return the environment of the kernels, which says that their runs are this batch's."""
    return os.environ | {
        "MLFLOW_RUN_ID": "",  # a run that `mlflow run` opened is the batch's, not a lesson's
        "MLFLOW_TRACKING_URI": tracking_uri(),  # absolute: a kernel works in the notebook's folder
        "DEMO_HOME": str(settings().home),
        "DEMO_BATCH_ID": uuid.uuid4().hex,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, joblib.cpu_count() // workers)),
    }


def _run_child(job: Job, parent_run_id: str, tags: dict[str, str], environment: dict[str, str]) -> None:
    """Run one lesson as a child run of the batch that ends with the lesson's status."""
    from demo_lib.store import close_stale_runs, own_name

    import mlflow

    if job.interrupted:
        return
    with mlflow.start_run(run_name=job.lesson, parent_run_id=parent_run_id, tags=tags):
        mlflow.log_params(job.params)
        with TemporaryDirectory() as folder:
            executed = Path(folder, job.output.name)
            _execute(job, executed, environment)
            _keep(job, executed)
        mlflow.log_metric("seconds", job.seconds)
        if job.error:
            mlflow.set_tag("error", job.error[:5000])
        mlflow.end_run(job.status)
    if job.status != "FINISHED" and (experiment := mlflow.get_experiment_by_name(own_name(job.lesson))):
        close_stale_runs([experiment.experiment_id])
    print(f"{job.lesson}: {job.status.lower()} in {job.seconds:.1f} s", flush=True)


def _execute(job: Job, executed: Path, environment: dict[str, str]) -> None:
    job.status, started = "RUNNING", time.monotonic()
    # A kernel of our own, as papermill's can't be ended; asynchronous, or nbclient would not see that it died.
    client = "jupyter_client.asynchronous.AsyncKernelClient"
    here = KernelSpecManager(kernel_dirs=[])  # this Python's: another one's may be installed by the same name
    kernel = KernelManager(
        kernel_name="python3", kernel_spec_manager=here, client_class=client, transport_encryption="auto"
    )
    said = (executed.parent / "stderr").open("w+", errors="replace")  # the notebook has what its cells print
    given = {"env": environment, "cwd": str(job.notebook.parent), "stdout": subprocess.DEVNULL, "stderr": said}
    try:
        kernel.start_kernel(extra_arguments=["--HistoryManager.hist_file=:memory:"], **given)
        job.kernel = kernel
        if job.interrupted:  # meanwhile
            raise InterruptedError
        pm.execute_notebook(job.notebook, executed, job.params, kernel_name="python3", km=kernel, progress_bar=False)
        job.status = "FINISHED"
    except pm.PapermillExecutionError as error:
        job.fail(f"cell [{error.exec_count}] failed with {error.ename}: {error.evalue}")
    except Exception as error:  # such as that the kernel died
        said.seek(0)
        last = said.read().strip().rpartition("\n")[2]
        job.fail(f"{type(error).__name__}: {error}" + f"; the kernel's last line: {last[:500]}" * bool(last))
    finally:
        job.stop_kernel()
        said.close()
        job.seconds = time.monotonic() - started


def _keep(job: Job, executed: Path) -> None:
    """Write the executed notebook, also a failed one, and its HTML page to their place, and log the notebook.

    One of which no cell ran, as without a kernel, shows nothing: it replaces no earlier one.
    """
    import mlflow
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    try:
        notebook = nbformat.read(executed, as_version=4)
        if job.error and not any(cell.get("execution_count") for cell in notebook.cells):
            return
        notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})  # of a progress bar, its end
        # A code cell's metadata `alt` is the alternative text of its image: of the templates only `classic` knows it.
        exporter, beside = HTMLExporter(embed_images=True, template_name="classic"), {"path": str(job.notebook.parent)}
        page, _ = exporter.from_notebook_node(notebook, {"metadata": beside})
        nbformat.write(notebook, executed)
        mlflow.log_artifact(str(executed))  # not job.output, to which another batch may write at the same time
        for suffix, content in {".html": page, ".ipynb": nbformat.writes(notebook)}.items():
            with whole_file(job.output.with_suffix(suffix)) as partial:
                partial.write_text(content, encoding="utf-8")
    except (OSError, ValueError) as error:
        job.fail(f"its executed notebook could not be kept: {error}")
