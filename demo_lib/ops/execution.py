"""Jobs of a batch: each notebook is executed in a kernel of its own, as a child run that ends as the job did."""

import logging
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from demo_lib.config import settings, tracking_uri, whole_file
from demo_lib.ops.jobs import Job

import joblib
import nbformat
import papermill as pm
from jupyter_client import KernelClient, KernelManager
from jupyter_client.kernelspec import KernelSpecManager

if TYPE_CHECKING:
    from mlflow.entities import Run

logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it says of an error is in the report
KERNEL = Path(__file__).with_name("kernel.py")


@dataclass(frozen=True)
class Batch:
    """What the jobs of a batch have in common; plain data, as the jobs."""

    run_id: str
    experiment_id: str
    tags: dict[str, str]  # of the child runs
    variables: dict[str, str]  # environment variables of the kernels


class Kernel(KernelManager):
    """A kernel whose client can be closed: nbclient leaves it open if the kernel is not its own."""

    def client(self, **options: Any) -> KernelClient:
        """Return a client of the kernel, the only one."""
        self._client = super().client(**options)
        return self._client

    def close_client(self) -> None:
        """Close the client, if there is one, with its sockets and threads; for the thread that has used it."""
        if hasattr(self, "_client"):
            self._client.stop_channels()
            self._client.context.destroy(linger=0)


class Kernels:
    """The kernels that this process has started; `end_all` ends them, and makes each later one end at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._running: list[KernelManager] = []

    def start(self, kernel: KernelManager, **options: Any) -> None:
        """Start the kernel; `InterruptedError` if all were ended meanwhile."""
        kernel.start_kernel(**options)
        self._running.append(kernel)
        if self.interrupted:
            raise InterruptedError

    def end(self, kernel: KernelManager) -> None:
        """End the kernel unless that is done: after its exit handlers have run or, interrupted, at once."""
        try:
            self._running.remove(kernel)
        except ValueError:  # it has not started, or another thread was faster
            return
        kernel.shutdown_kernel(now=self.interrupted or not kernel.is_alive())

    def end_all(self) -> None:
        """End all kernels, at once."""
        self.interrupted = True
        for kernel in [*self._running]:
            self.end(kernel)


def describe(parent: "Run", workers: int) -> Batch:
    """Return what the jobs have in common whose parent run this is, and of which so many run at once."""
    from demo_lib.tracking import provenance

    run_id = parent.info.run_id
    return Batch(run_id, parent.info.experiment_id, provenance() | {"batch_id": run_id}, _variables(run_id, workers))


def run_here(
    parent: "Run", jobs: Sequence[Job], workers: int, follow: Callable[[], None] = lambda: None, every: float = 1
) -> None:
    """Run the jobs, `workers` at a time (0: one a core), and end all kernels at an exception in the main thread.

    `follow` is called each time that so many seconds have passed, and may raise one.
    """
    workers = min(max(workers, 0) or joblib.cpu_count(), max(len(jobs), 1))
    batch, kernels = describe(parent, workers), Kernels()
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


def run_job(job: Job, batch: Batch, kernels: Kernels) -> Job:
    """Run the job as a child run of the batch, and return it with its `run_id`, `status`, `seconds` and `error`.

    One that has a child run already is repeated in that run. Nothing is done if the kernels of this process were ended.
    """
    from demo_lib.store import close_stale_runs, own_name

    import mlflow

    if kernels.interrupted:
        return job
    tags = batch.tags | {"job": str(job.number)}
    if job.run_id:
        reopen(job.run_id, tags)
    nested = {"experiment_id": batch.experiment_id, "parent_run_id": batch.run_id}
    with mlflow.start_run(job.run_id or None, run_name=job.name, tags=tags, **nested) as child:
        job.run_id, job.status, job.error = child.info.run_id, "RUNNING", ""
        mlflow.log_params(job.params)
        with TemporaryDirectory() as folder:
            executed = Path(folder, job.output.name)
            _execute(job, executed, os.environ | batch.variables, kernels)
            _keep(job, executed, kernels)
        mlflow.log_metric("seconds", job.seconds)
        if job.error:
            mlflow.set_tag("error", job.error[:5000])
        mlflow.end_run(job.status)
    # What the kernel left, or one before it that was killed.
    if experiment := mlflow.get_experiment_by_name(own_name(job.notebook.stem)):
        close_stale_runs([experiment.experiment_id])
    say(job)
    return job


def say(job: Job) -> None:
    """Print that the job is done."""
    print(f"{job.name}: {job.status.lower()} in {job.seconds:.1f} s\n", end="", flush=True)  # one line, of one thread


def reopen(run_id: str, tags: dict[str, str]) -> None:
    """Let an ended run go on in this process. The tags come first: a run of a process that is gone would be closed."""
    from mlflow import MlflowClient
    from mlflow.entities import RunTag

    client = MlflowClient()
    client.log_batch(run_id, tags=[RunTag(*each) for each in tags.items()])
    if "error" in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, "error")
    client.update_run(run_id, "RUNNING")


def _variables(run_id: str, workers: int) -> dict[str, str]:
    """Return the variables of the kernels, which say that their runs are this batch's."""
    return {
        "MLFLOW_RUN_ID": "",  # a run that `mlflow run` opened is the batch's, not a lesson's
        "MLFLOW_TRACKING_URI": tracking_uri(),  # absolute: a kernel works in the notebook's folder
        "DEMO_HOME": str(settings().home),
        "DEMO_BATCH_ID": run_id,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, joblib.cpu_count() // workers)),
    }


def _execute(job: Job, executed: Path, environment: dict[str, str], kernels: Kernels) -> None:
    started = time.monotonic()
    # A kernel of our own, as papermill's can't be ended; asynchronous, or nbclient would not see that it died.
    client = "jupyter_client.asynchronous.AsyncKernelClient"
    here = KernelSpecManager(kernel_dirs=[])  # this Python's: another one's may be installed by the same name
    kernel = Kernel(kernel_name="python3", kernel_spec_manager=here, client_class=client, transport_encryption="auto")
    command = kernel.kernel_spec.argv
    start = command.index("-m")
    command[start : start + 2] = [str(KERNEL)]  # which starts the module that stood there
    said = (executed.parent / "stderr").open("w+", errors="replace")  # the notebook has what its cells print
    given = {"env": environment, "cwd": str(job.notebook.parent), "stdout": subprocess.DEVNULL, "stderr": said}
    given["extra_arguments"] = ["--HistoryManager.hist_file=:memory:"]
    try:
        kernels.start(kernel, stdin=subprocess.PIPE, **given)
        pm.execute_notebook(job.notebook, executed, job.params, kernel_name="python3", km=kernel, progress_bar=False)
        job.status = "FINISHED"
    except pm.PapermillExecutionError as error:
        _fail(job, kernels, f"cell [{error.exec_count}] failed with {error.ename}: {error.evalue}")
    except Exception as error:  # such as that the kernel died
        said.seek(0)
        last = said.read().strip().rpartition("\n")[2]
        _fail(job, kernels, f"{type(error).__name__}: {error}" + f"; the kernel's last line: {last[:500]}" * bool(last))
    finally:
        kernels.end(kernel)
        kernel.close_client()
        said.close()
        job.seconds = time.monotonic() - started


def _fail(job: Job, kernels: Kernels, error: str) -> None:
    """Note the first reason why the job did not finish; interrupted, it was killed whatever error that caused."""
    job.status = "KILLED" if kernels.interrupted else "FAILED"
    job.error = "interrupted." if kernels.interrupted else job.error or error


def _keep(job: Job, executed: Path, kernels: Kernels) -> None:
    """Write the executed notebook, also a failed one, and its HTML page to their place, and log both.

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
        for suffix, content in {".html": page, ".ipynb": nbformat.writes(notebook)}.items():
            executed.with_suffix(suffix).write_text(content, encoding="utf-8")
            # Not the file in its place, to which another batch may write at the same time.
            mlflow.log_artifact(str(executed.with_suffix(suffix)))
            with whole_file(job.output.with_suffix(suffix)) as partial:
                partial.write_text(content, encoding="utf-8")
    except (OSError, ValueError) as error:
        _fail(job, kernels, f"its executed notebook could not be kept: {error}")
