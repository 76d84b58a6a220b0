"""What makes a tracked run worth trusting: provenance, a truthful status, batched metrics, datasets, models."""

from __future__ import annotations

import copy
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_lib import internals
from demo_lib.config import LESSONS, ROOT, Config, DemoError, TrainConfig, settings
from demo_lib.interrupts import release_locks, signals, terminable
from demo_lib.store import this_process

import git
import mlflow
from mlflow import MlflowClient
from mlflow.data.numpy_dataset import from_numpy
from mlflow.entities import Metric, Run
from mlflow.environment_variables import MLFLOW_RUN_ID
from mlflow.models.model import ModelInfo
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE

if TYPE_CHECKING:  # PyTorch takes seconds to load, and the batch run tracks without it
    from demo_lib.data import FashionData

    from torch import Tensor, nn

PACKAGES = ("mlflow", "torch", "torchvision", "optuna")


def provenance(data: FashionData | None = None, config: TrainConfig | None = None) -> dict[str, str]:
    """Return the tags that say where a run came from: source, commit, versions, data, device, seed, process.

    The source is the notebook that is named like the connected experiment, or else the command line; MLflow has
    recorded that of a run which `mlflow run` opened. Parts that are unknown are left out.
    """
    tags = {f"{package}_version": version(package) for package in PACKAGES}
    tags |= {"python_version": platform.python_version(), "process": this_process()}
    tags |= _source() | _commit()
    if data is not None:
        tags |= {"data_source": data.source, "data_digest": data.digest}
    if config is not None:
        from demo_lib.training import pick_device

        import torch

        tags |= {"device": str(pick_device(config)), "cpu_threads": str(torch.get_num_threads())}
        tags |= {"seed": str(config.seed)}
    batch_id = settings().batch_id
    return tags | ({"batch_id": batch_id} if batch_id else {})


@contextmanager
def truthful_status() -> Iterator[None]:
    """End the active run with the status that tells what happened; use it in the `with` that starts the run.

    Ctrl-C, SIGTERM and `sys.exit` end it KILLED (MLflow alone says FAILED, or leaves it RUNNING); any other exception
    ends it FAILED. The tag `error` has the exception, which goes on; SIGTERM still ends the process.
    """
    run = mlflow.active_run()
    if run is None:
        raise DemoError("truthful_status() needs an active run: start one before it in the same `with`.")
    with terminable():
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            with signals({signal.SIGINT: signal.SIG_IGN, signal.SIGTERM: signal.SIG_IGN}):
                if interrupted:
                    release_locks(error)
                _close_down_to(run, "KILLED" if interrupted else "FAILED", error)
            raise


@contextmanager
def batched_metrics(seconds: float = 2.0, size: int = 500) -> Iterator[Callable[..., None]]:
    """Give a stand-in for `mlflow.log_metrics` that sends the active run's metrics in batches, all of them at the end.

    A call sends what waits if that is older than `seconds` or has `size` metrics, so that the UI stays live.
    """
    run_id, client = mlflow.active_run().info.run_id, MlflowClient()
    pending: list[Metric] = []
    sent = time.monotonic()

    def flush() -> None:
        nonlocal sent
        while pending:
            client.log_batch(run_id, metrics=pending[:1000])  # MLflow's limit for one call
            del pending[:1000]
        sent = time.monotonic()

    def log_metrics(metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        pending.extend(Metric(key, value, now, step) for key, value in metrics.items())
        if len(pending) >= size or time.monotonic() - sent > seconds:
            flush()

    try:
        yield log_metrics
    finally:
        flush()


def log_config(config: Config, exclude: Collection[str] = ()) -> None:
    """Log the configuration's fields as parameters of the active run.

    `mlflow run` has logged some as they were typed, quoted for the shell, such as `true` for `True`, and MLflow
    refuses to change a parameter: those that mean the same are left. If the run has another value, it is a DemoError.
    """
    run = mlflow.get_run(mlflow.active_run().info.run_id)
    fields = config.model_dump(exclude=set(exclude))
    logged = {name: " ".join(shlex.split(text)) for name, text in run.data.params.items() if name in fields}
    meant = type(config)(**config.model_dump() | logged).model_dump()
    if other := [name for name in logged if meant[name] != fields[name]]:
        had = f"run {run.info.run_id} has {other[0]} = {logged[other[0]]} already, not {fields[other[0]]}"
        raise DemoError(f"{had}: start a run of its own.")
    mlflow.log_params({name: value for name, value in fields.items() if name not in logged})


def log_datasets(data: FashionData) -> None:
    """Link the active run to the training and validation images it uses, with their digests."""
    from demo_lib.data import ADDRESS

    for context, split in {"training": data.train, "validation": data.validation}.items():
        images, labels = split.images.numpy(), split.labels.numpy()
        dataset = from_numpy(images, ADDRESS, targets=labels, name=data.name)
        mlflow.log_input(dataset, context=context)


def log_model(model: nn.Module, name: str, example: Tensor, **kwargs: Any) -> ModelInfo:
    """Log the model with its signature, an input example and pinned requirements, and return what MLflow made of it.

    `example` holds at least two images, float32 of shape (B, 1, 28, 28): torch.export freezes a batch of one.
    """
    model = copy.deepcopy(model).cpu().eval()
    pins = [f"{package}=={version(package)}" for package in ("torch", "torchvision", "mlflow")]
    return mlflow.pytorch.log_model(model, name=name, input_example=example.numpy(), pip_requirements=pins, **kwargs)


def _close_down_to(run: Run, status: str, error: BaseException) -> None:
    """End the run, and the runs nested in it that are still open, as `status`; it may have ended itself already."""
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    MlflowClient().set_tag(run.info.run_id, "error", text[:5000])
    if mlflow.get_run(run.info.run_id).info.status != "RUNNING":
        return
    while (active := mlflow.active_run()) is not None:
        mlflow.end_run(status)
        if active.info.run_id == run.info.run_id:
            return


def _source() -> dict[str, str]:
    if MLFLOW_RUN_ID.get():
        return {}
    experiment = MlflowClient().get_experiment(internals.active_experiment_id())
    notebook = LESSONS / f"{experiment.name.rpartition('/')[2]}.ipynb"
    if notebook.is_file():
        return {MLFLOW_SOURCE_NAME: f"notebooks/{notebook.name}", MLFLOW_SOURCE_TYPE: "NOTEBOOK"}
    program, *arguments = sys.argv
    if Path(program).name == "__main__.py":
        program = f"python -m {Path(program).parent.name}"
    return {MLFLOW_SOURCE_NAME: " ".join([program, *arguments]), MLFLOW_SOURCE_TYPE: "LOCAL"}


def _commit() -> dict[str, str]:
    try:
        with git.Repo(ROOT) as repository:
            commit, dirty = repository.head.commit.hexsha, str(repository.is_dirty()).lower()
        return {MLFLOW_GIT_COMMIT: commit, "git_dirty": dirty}
    except (git.exc.GitError, ValueError, OSError):  # no repository, no commit yet, no git, or not ours to read
        return {}
