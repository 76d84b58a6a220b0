"""Run lessons headless through papermill: checked first, in parallel, tracked in MLflow, with a report that is true."""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

from demo_lib.config import ROOT, DemoError, settings, tracking_uri

import nbformat
import papermill as pm
from jupyter_client import KernelManager
from nbclient.exceptions import DeadKernelError
from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

if TYPE_CHECKING:
    from mlflow.entities import Run

LESSONS = ROOT / "notebooks"
TYPES = {"int": int, "float": float, "str": str, "bool": bool}
KERNEL = "python3"
CLIENT = "jupyter_client.asynchronous.AsyncKernelClient"
# A code cell's metadata `alt` is the alternative text of the image that it shows. nbconvert's template `classic` knows
# it, the better-looking `lab` does not yet.
BLOCK = """
{%- block NAME -%}
{%- set alt = 'alt="' ~ (cell.metadata.alt | escape_html) ~ '" ' if cell.metadata.alt else "" -%}
{{ super() | replace("<img ", "<img " ~ alt, 1) }}
{%- endblock NAME -%}
"""
BLOCKS = [BLOCK.replace("NAME", name) for name in ("data_png", "data_jpg", "data_svg")]
PAGE = "".join(["{%- extends 'lab/index.html.j2' -%}", *BLOCKS])
INTERRUPT_SECONDS = 10  # how long an interrupted lesson may take to end its runs before its kernel is killed


class BatchError(DemoError):
    """A lesson or parameter is unknown, or a value has the wrong type; raised before anything runs."""


class Interrupted(BaseException):
    """The batch was interrupted: no cell starts any more."""


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
    kernel: KernelManager | None = field(default=None, repr=False)

    @property
    def lesson(self) -> str:
        """The notebook's file name without its ending."""
        return self.notebook.stem

    def start_kernel(self, environment: Mapping[str, str]) -> None:
        """Start a kernel of our own, which can be interrupted, unless there is one; papermill's can't be reached."""
        if self.kernel is None:
            # nbclient needs the asynchronous client: with the blocking one it never sees that a kernel died.
            kernel = KernelManager(kernel_name=KERNEL, client_class=CLIENT, transport_encryption="auto")
            kernel.start_kernel(
                env=dict(environment),
                cwd=str(self.notebook.parent),
                extra_arguments=["--HistoryManager.hist_file=:memory:"],
                stdout=subprocess.DEVNULL,  # the notebook has what its cells print
                stderr=subprocess.DEVNULL,
            )
            self.kernel = kernel

    def stop_kernel(self, now: bool) -> None:
        """End the kernel if there is one, at once or after its exit handlers have run."""
        kernel, self.kernel = self.kernel, None
        if kernel is not None:
            kernel.shutdown_kernel(now=now)

    def fail(self, error: str) -> None:
        """Note the first reason why the job did not finish; interrupted, it was killed whatever error that caused."""
        self.status = "KILLED" if self.interrupted else "FAILED"
        self.error = "interrupted." if self.interrupted else self.error or error

    def stop_if_interrupted(self) -> None:
        """Raise Interrupted before the next cell if the batch was interrupted."""
        if self.interrupted:
            raise Interrupted


def lessons() -> list[Path]:
    """Return the notebooks of all lessons in order."""
    return sorted(LESSONS.glob("[0-9][0-9]_*.ipynb"))


def plan(names: Iterable[str], params: Mapping[str, Any], output: Path) -> list[Job]:
    """Return one job a lesson, all lessons if none is named, each with those of the parameters that it declares.

    A name is a lesson's number, file stem or path. Values may be text, as a command line gives them.

    Raises:
        BatchError: a lesson is unknown, no chosen lesson declares a parameter, or a value has the wrong type.
    """
    notebooks = list(dict.fromkeys(_find(name) for name in names)) or lessons()
    declared = {notebook: pm.inspect_notebook(notebook) for notebook in notebooks}
    known = {name: inferred["inferred_type_name"] for each in declared.values() for name, inferred in each.items()}
    if unknown := [name for name in params if name not in known]:
        raise BatchError(f"no chosen lesson has a parameter {unknown[0]!r}; they have: {', '.join(known) or 'none'}.")
    values = {name: _typed(name, value, known[name]) for name, value in params.items()}
    return [
        Job(notebook, {name: values[name] for name in inferred if name in values}, output.absolute() / notebook.name)
        for notebook, inferred in declared.items()
    ]


def run(jobs: Sequence[Job], workers: int = 0, progress: bool = True) -> str:
    """Run the jobs, `workers` at a time (0: one a core), and return the id of the batch's MLflow run.

    Each job's `status`, `seconds` and `error` tell what came of it. Ctrl-C and SIGTERM interrupt the running lessons,
    which end their own runs; the parent run ends KILLED and the exception goes on.

    Raises:
        BatchError: a folder for the executed notebooks can't be made; nothing has run.
    """
    _make_folders(jobs)
    cores = os.cpu_count() or 1
    workers = min(workers or cores, len(jobs))
    environment = os.environ | {
        "MLFLOW_RUN_ID": "",  # a run that `mlflow run` opened is the batch's, not a lesson's
        "MLFLOW_TRACKING_URI": tracking_uri(),  # absolute: a kernel works in the notebook's folder
        "DEMO_HOME": str(settings().home),
        "DEMO_BATCH_ID": uuid.uuid4().hex,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // workers)),
    }
    try:
        for job in jobs[:workers]:
            job.start_kernel(environment)  # they start while this process loads MLflow
        return _run_tracked(jobs, workers, environment, progress)
    finally:
        for job in jobs:
            job.stop_kernel(now=True)


def _make_folders(jobs: Sequence[Job]) -> None:
    for folder in dict.fromkeys(job.output.parent for job in jobs):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BatchError(
                f"the folder {folder} can't be made ({error.strerror}): choose another --output."
            ) from None


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
        raise BatchError(f"there is no lesson {name!r}; there are: {', '.join(path.stem for path in lessons())}.")
    return found[0]


def _typed(name: str, value: Any, kind: str) -> Any:
    """Return the value as the type that the parameter declares."""
    try:
        return TypeAdapter(TYPES.get(kind, Any)).validate_python(value)
    except ValidationError:
        raise BatchError(f"parameter {name} = {value!r} must be of type {kind}.") from None


def _run_tracked(jobs: Sequence[Job], workers: int, environment: Mapping[str, str], progress: bool) -> str:
    from demo_lib.tracking import connect, provenance, truthful_status

    import mlflow

    connect("batch")
    tags = provenance() | {"batch_id": environment["DEMO_BATCH_ID"]}
    cells = sum(_count_code_cells(job.notebook) for job in jobs)
    with (
        mlflow.start_run(run_name=f"batch of {len(jobs)}", tags=tags) as parent,
        truthful_status(),
        tqdm(total=cells, unit="cell", disable=None if progress else True) as bar,
    ):
        mlflow.log_params({"lessons": " ".join(job.lesson for job in jobs), "workers": workers})
        with ThreadPoolExecutor(workers) as pool, _interrupting(jobs):
            futures = [pool.submit(_run_child, job, parent, environment, bar) for job in jobs]
            while wait(futures, timeout=1).not_done:  # Windows delivers Ctrl-C only between waits
                pass
        for future in futures:
            future.result()
        failed = sum(job.status != "FINISHED" for job in jobs)
        mlflow.log_metric("failed_lessons", failed)
        if failed:
            mlflow.end_run("FAILED")
    return parent.info.run_id


def _run_child(job: Job, parent: Run, environment: Mapping[str, str], bar: tqdm) -> None:
    """Run one lesson as a child run of the batch that ends with the lesson's status."""
    from demo_lib.tracking import close_stale_runs, own_name, provenance

    from mlflow import MlflowClient
    from mlflow.entities import Param
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    if job.interrupted:
        return
    client = MlflowClient()
    tags = provenance() | {"batch_id": environment["DEMO_BATCH_ID"], MLFLOW_PARENT_RUN_ID: parent.info.run_id}
    child = client.create_run(parent.info.experiment_id, run_name=job.lesson, tags=tags).info.run_id
    try:
        client.log_batch(child, params=[Param(name, str(value)) for name, value in job.params.items()])
        _execute(job, environment, bar)
        client.log_metric(child, "seconds", job.seconds)
        if job.error:
            client.set_tag(child, "error", job.error[:5000])
        if job.kept:
            client.log_artifact(child, str(job.output))
    finally:
        client.set_terminated(child, job.status if job.status in ("FINISHED", "KILLED") else "FAILED")
        if job.status != "FINISHED" and (experiment := client.get_experiment_by_name(own_name(job.lesson))):
            close_stale_runs([experiment.experiment_id])
        bar.write(f"{job.lesson}: {job.status.lower()} in {job.seconds:.1f} s")


def _execute(job: Job, environment: Mapping[str, str], bar: tqdm) -> None:
    """Execute the notebook under another name and rename it, so that no half-written file replaces a good one."""
    job.status, started = "RUNNING", time.monotonic()
    partial = job.output.parent / ".partial" / job.output.name
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        job.start_kernel(environment)
        pm.execute_notebook(
            job.notebook,
            partial,
            job.params,
            kernel_name=KERNEL,
            progress_bar=False,
            km=job.kernel,
            on_cell_start=lambda **_: job.stop_if_interrupted(),
            on_cell_complete=lambda **_: bar.update(),
        )
        job.status = "FINISHED"
    except pm.PapermillExecutionError as error:
        where = f"cell [{error.exec_count}] failed with {error.ename}: {error.evalue}"
        job.fail(f"{where}\n\n{indent(error.source, '    ')}")
    except DeadKernelError:
        job.fail("its kernel died: killed, or out of memory.")
    except (Exception, Interrupted) as error:
        job.fail(f"{type(error).__name__}: {error}")
    finally:
        job.stop_kernel(now=job.interrupted)
    job.seconds = time.monotonic() - started
    _keep(job, partial)


@contextmanager
def _interrupting(jobs: Sequence[Job]) -> Iterator[None]:
    """On an exception such as Ctrl-C, interrupt the running kernels, and kill those that don't stop in time."""
    try:
        yield
    except BaseException:
        for job in jobs:
            job.interrupted = True
        for job in jobs:
            if kernel := job.kernel:
                kernel.interrupt_kernel()
        patience = time.monotonic() + INTERRUPT_SECONDS
        while any(job.kernel for job in jobs) and time.monotonic() < patience:
            time.sleep(0.1)
        for job in jobs:
            job.stop_kernel(now=True)
        raise


def _keep(job: Job, partial: Path) -> None:
    """Move a whole executed notebook to its place and write its HTML page beside it."""
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    try:
        executed = nbformat.read(partial, as_version=4)
        executed, _ = CoalesceStreamsPreprocessor().preprocess(executed, {})  # of a progress bar, its end
        nbformat.write(executed, partial)
        exporter = HTMLExporter(embed_images=True, template_file="page", extra_loaders=[DictLoader({"page": PAGE})])
        page, _ = exporter.from_notebook_node(executed)
        partial.with_suffix(".html").write_text(page, encoding="utf-8")
        for suffix in (".html", ".ipynb"):
            partial.with_suffix(suffix).replace(job.output.with_suffix(suffix))
        job.kept = True
        with suppress(OSError):
            partial.parent.rmdir()  # unless other lessons still use it
    except (OSError, ValueError) as error:
        job.fail(f"its executed notebook could not be kept: {error}")


def _count_code_cells(notebook: Path) -> int:
    return sum(cell.cell_type == "code" for cell in nbformat.read(notebook, as_version=4).cells)
