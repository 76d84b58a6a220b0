"""Run lessons headless through papermill: checked first, in parallel, tracked in MLflow, with a report that is true."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent
from typing import Any

from demo_lib.config import DemoError, lessons, settings, tracking_uri, whole_file

import nbformat
import papermill as pm
from jupyter_client import KernelManager
from nbclient.exceptions import DeadKernelError
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

KERNEL = "python3"
TYPES = {"int": int, "float": float, "str": str, "bool": bool}
# A code cell's metadata `alt` is the alternative text of the image that it shows. nbconvert's template `classic` knows
# it, the better-looking `lab` does not yet.
BLOCK = """
{%- block NAME -%}
{%- set alt = 'alt="' ~ (cell.metadata.alt | escape_html) ~ '" ' if cell.metadata.alt else "" -%}
{{ super() | replace("<img ", "<img " ~ alt, 1) }}
{%- endblock NAME -%}
"""
IMAGES = ("data_png", "data_jpg", "data_svg")
PAGE = "{%- extends 'lab/index.html.j2' -%}" + "".join(BLOCK.replace("NAME", name) for name in IMAGES)
INTERRUPT_SECONDS = 10  # how long an interrupted lesson may take to end its runs before its kernel is killed


@dataclass
class Job:
    """One lesson of a batch: what to run with which parameters, and what came of it."""

    notebook: Path
    params: dict[str, Any]
    output: Path
    status: str = "NOT RUN"  # then RUNNING and, as MLflow calls them, FINISHED, FAILED or KILLED
    seconds: float = 0.0
    error: str = ""
    kept: bool = False  # whether this run's notebook is at `output`
    interrupted: bool = False
    kernel: KernelManager | None = None

    @property
    def lesson(self) -> str:
        """The notebook's file name without its ending."""
        return self.notebook.stem

    def stop_kernel(self, now: bool) -> None:
        """End the kernel if there is one, at once or after its exit handlers have run."""
        kernel, self.kernel = self.kernel, None
        if kernel is not None:
            kernel.shutdown_kernel(now=now)

    def fail(self, error: str) -> None:
        """Note the first reason why the job did not finish; interrupted, it was killed whatever error that caused."""
        self.status = "KILLED" if self.interrupted else "FAILED"
        self.error = "interrupted." if self.interrupted else self.error or error


def plan(names: Iterable[str], params: Mapping[str, Any], output: Path) -> list[Job]:
    """Return one job a lesson, all lessons if none is named, each with those of the parameters that it declares.

    A name is a lesson's number, file stem or path. Values may be text, as a command line gives them.

    Raises:
        DemoError: a lesson is unknown, no chosen lesson declares a parameter, or a value has the wrong type.
    """
    notebooks = list(dict.fromkeys(_find(name) for name in names)) or lessons()
    declared = {notebook: pm.inspect_notebook(notebook) for notebook in notebooks}
    known = {name: inferred["inferred_type_name"] for each in declared.values() for name, inferred in each.items()}
    if unknown := [name for name in params if name not in known]:
        raise DemoError(f"no chosen lesson has a parameter {unknown[0]!r}; they have: {', '.join(known) or 'none'}.")
    values = {name: _typed(name, value, known[name]) for name, value in params.items()}
    return [
        Job(notebook, {name: values[name] for name in inferred if name in values}, output.absolute() / notebook.name)
        for notebook, inferred in declared.items()
    ]


def run(jobs: Sequence[Job], workers: int = 0) -> None:
    """Run the jobs, `workers` at a time (0: one a core), tracked in the experiment `batch`.

    Each job's `status`, `seconds` and `error` tell what came of it. Ctrl-C and SIGTERM interrupt the running lessons,
    which end their own runs; the parent run ends KILLED and the exception goes on.

    Raises:
        DemoError: the folder for the executed notebooks can't be made; nothing has run.
    """
    from demo_lib.store import connect
    from demo_lib.tracking import provenance, truthful_status

    import mlflow

    folder = jobs[0].output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"the folder {folder} can't be made ({error.strerror}): choose another --output.") from None
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    environment = _environment(workers)
    connect("batch")
    tags = provenance() | {"batch_id": environment["DEMO_BATCH_ID"]}
    with mlflow.start_run(run_name=f"batch of {len(jobs)}", tags=tags) as parent, truthful_status():
        mlflow.log_params({"lessons": " ".join(job.lesson for job in jobs), "workers": workers})
        _run_all(jobs, workers, parent.info.run_id, environment)
        failed = sum(job.status != "FINISHED" for job in jobs)
        mlflow.log_metric("failed_lessons", failed)
        if failed:
            mlflow.end_run("FAILED")


def table(jobs: Sequence[Job]) -> str:
    """Return the report of a batch as text: lesson, status, seconds, executed notebook, then the errors."""
    width = max(len(job.lesson) for job in jobs)
    lines = [f"{'lesson':{width}}  status    seconds  executed notebook"]
    for job in jobs:
        output = os.path.relpath(job.output) if job.kept else "-"
        lines.append(f"{job.lesson:{width}}  {job.status:8}  {job.seconds:7.1f}  {output}")
    errors = [f"\n{job.lesson}: {job.error}" for job in jobs if job.error]
    return "\n".join(lines + errors)


def _find(name: str) -> Path:
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name).resolve()
    found = [notebook for notebook in lessons() if name in (notebook.stem, notebook.name, notebook.stem.split("_")[0])]
    if not found:
        raise DemoError(f"there is no lesson {name!r}; there are: {', '.join(path.stem for path in lessons())}.")
    return found[0]


def _typed(name: str, value: Any, kind: str) -> Any:
    try:
        return TypeAdapter(TYPES.get(kind, Any)).validate_python(value)
    except ValidationError:
        raise DemoError(f"parameter {name} = {value!r} must be of type {kind}.") from None


def _environment(workers: int) -> dict[str, str]:
    """Return the environment of the kernels, which says that their runs are this batch's."""
    return os.environ | {
        "MLFLOW_RUN_ID": "",  # a run that `mlflow run` opened is the batch's, not a lesson's
        "MLFLOW_TRACKING_URI": tracking_uri(),  # absolute: a kernel works in the notebook's folder
        "DEMO_HOME": str(settings().home),
        "DEMO_BATCH_ID": uuid.uuid4().hex,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers)),
    }


def _run_all(jobs: Sequence[Job], workers: int, parent_run_id: str, environment: Mapping[str, str]) -> None:
    cells = sum(cell.cell_type == "code" for job in jobs for cell in nbformat.read(job.notebook, as_version=4).cells)
    with tqdm(total=cells, unit="cell", disable=None) as bar, ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_run_child, job, parent_run_id, environment, bar) for job in jobs]
        try:
            while wait(futures, timeout=1).not_done:  # Windows delivers Ctrl-C only between waits
                pass
        except BaseException:
            _interrupt(jobs, futures)
            raise
    for future in futures:
        future.result()


def _run_child(job: Job, parent_run_id: str, environment: Mapping[str, str], bar: tqdm) -> None:
    """Run one lesson as a child run of the batch that ends with the lesson's status."""
    from demo_lib.store import close_stale_runs, own_name
    from demo_lib.tracking import provenance

    import mlflow

    if job.interrupted:
        return
    tags = provenance() | {"batch_id": environment["DEMO_BATCH_ID"]}
    with mlflow.start_run(run_name=job.lesson, parent_run_id=parent_run_id, tags=tags):
        mlflow.log_params(job.params)
        _execute(job, environment, bar)
        mlflow.log_metric("seconds", job.seconds)
        if job.error:
            mlflow.set_tag("error", job.error[:5000])
        if job.kept:
            mlflow.log_artifact(str(job.output))
        mlflow.end_run(job.status)
    if job.status != "FINISHED" and (experiment := mlflow.get_experiment_by_name(own_name(job.lesson))):
        close_stale_runs([experiment.experiment_id])
    bar.write(f"{job.lesson}: {job.status.lower()} in {job.seconds:.1f} s")


def _execute(job: Job, environment: Mapping[str, str], bar: tqdm) -> None:
    def stop_if_interrupted(**_: Any) -> None:
        if job.interrupted:
            raise InterruptedError

    job.status, started = "RUNNING", time.monotonic()
    with TemporaryDirectory() as folder:
        executed = Path(folder, job.output.name)
        try:
            job.kernel = _start_kernel(job.notebook.parent, environment)
            hooks = {"on_cell_start": stop_if_interrupted, "on_cell_complete": lambda **_: bar.update()}
            options = {"kernel_name": KERNEL, "km": job.kernel, "progress_bar": False}
            pm.execute_notebook(job.notebook, executed, job.params, **options, **hooks)
            job.status = "FINISHED"
        except pm.PapermillExecutionError as error:
            where = f"cell [{error.exec_count}] failed with {error.ename}: {error.evalue}"
            job.fail(f"{where}\n\n{indent(error.source, '    ')}")
        except DeadKernelError:
            job.fail("its kernel died: killed, or out of memory.")
        except Exception as error:
            job.fail(f"{type(error).__name__}: {error}")
        finally:
            job.stop_kernel(now=job.interrupted)
        job.seconds = time.monotonic() - started
        _keep(job, executed)


def _start_kernel(folder: Path, environment: Mapping[str, str]) -> KernelManager:
    """Start a kernel of our own, which can be interrupted: papermill's can't be reached."""
    # nbclient needs the asynchronous client: with the blocking one it never sees that a kernel died.
    client = "jupyter_client.asynchronous.AsyncKernelClient"
    kernel = KernelManager(kernel_name=KERNEL, client_class=client, transport_encryption="auto")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the notebook has what its cells print
    arguments = ["--HistoryManager.hist_file=:memory:"]
    kernel.start_kernel(env=dict(environment), cwd=str(folder), extra_arguments=arguments, **quiet)
    return kernel


def _interrupt(jobs: Sequence[Job], futures: Sequence[Future]) -> None:
    """Interrupt the running kernels, and kill those that don't stop in time; no further cell starts."""
    for job in jobs:
        job.interrupted = True
        if kernel := job.kernel:
            kernel.interrupt_kernel()
    wait(futures, INTERRUPT_SECONDS)
    for job in jobs:
        job.stop_kernel(now=True)


def _keep(job: Job, executed: Path) -> None:
    """Write the executed notebook, also a failed one, and its HTML page to their place."""
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    try:
        notebook = nbformat.read(executed, as_version=4)
        notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})  # of a progress bar, its end
        exporter = HTMLExporter(embed_images=True, template_file="page", extra_loaders=[DictLoader({"page": PAGE})])
        page, _ = exporter.from_notebook_node(notebook)
        for suffix, content in {".html": page, ".ipynb": nbformat.writes(notebook)}.items():
            with whole_file(job.output.with_suffix(suffix)) as partial:
                partial.write_text(content, encoding="utf-8")
        job.kept = True
    except (OSError, ValueError) as error:
        job.fail(f"its executed notebook could not be kept: {error}")
