"""What makes a tracked run worth trusting: provenance, a truthful status, parameters, datasets, models."""

from __future__ import annotations

import copy
import os
import platform
import signal
import sys
import threading
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_lib.config import LESSONS, ROOT, Config, DemoError, TrainConfig, settings, without_login
from demo_lib.identity import identity, torchrun_processes

import git
import mlflow
from mlflow import MlflowClient
from mlflow.data.numpy_dataset import from_numpy
from mlflow.environment_variables import MLFLOW_EXPERIMENT_ID, MLFLOW_RUN_ID
from mlflow.models.model import ModelInfo

if TYPE_CHECKING:  # PyTorch takes seconds to load, and the batch run tracks without it
    from demo_lib.data import FashionData

    from torch import Tensor, nn

ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
PACKAGES = ("mlflow", "torch", "torchvision", "optuna")


def provenance(data: FashionData | None = None, config: TrainConfig | None = None) -> dict[str, str]:
    """Return the tags that say where a run came from: source, commit, versions, data, device, seed, processes.

    The source is the notebook that is named like the connected experiment, or else the command line; for a run that
    `mlflow run` opened, MLflow has recorded it. Parts that are unknown are left out.
    """
    tags = {f"{package}_version": version(package) for package in PACKAGES}
    tags |= {"python_version": platform.python_version(), "process": identity(os.getpid())} | _source() | _commit()
    if batch_id := settings().batch_id:
        tags["batch_id"] = batch_id
    if data is not None:
        tags |= {"data_source": data.source, "data_digest": data.digest}
    if config is not None:
        from demo_lib.parallel import joined_processes
        from demo_lib.training import pick_device

        import torch

        tags |= {"device": str(pick_device(config)), "cpu_threads": str(torch.get_num_threads())}
        tags |= {"processes": str(joined_processes()), "seed": str(config.seed)}
    return tags


@contextmanager
def truthful_status() -> Iterator[None]:
    """End the active run with the status that tells what happened; use it in the `with` that starts the run.

    Ctrl-C, SIGTERM, SIGHUP and `sys.exit` end it KILLED (MLflow alone says FAILED, or leaves it RUNNING); any other
    exception ends it FAILED, and so does SIGTERM where torchrun started several processes: it sends it when one of them
    died. The tag `error` has the exception, which goes on; the signals still end the process.
    """
    run = mlflow.active_run()
    if run is None:
        raise DemoError("truthful_status() needs an active run: start one before it in the same `with`.")
    with terminable():
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            status = getattr(error, "status", "KILLED") if interrupted else "FAILED"
            if interrupted:  # IPython asks for it: a page of traceback says nothing
                shown = f"{type(error).__name__}: run {run.info.run_name} ({run.info.run_id}) ended {status}."
                error._render_traceback_ = lambda: [shown]  # type: ignore[attr-defined]
            with signals(dict.fromkeys([signal.SIGINT, *ENDS], signal.SIG_IGN)):
                if interrupted:  # a query that was cut off keeps SQLite locked as long as the traceback's frames live
                    traceback.clear_frames(error.__traceback__)
                MlflowClient().set_tag(run.info.run_id, "error", f"{type(error).__name__}: {error}".rstrip(": ")[:5000])
                # With the runs nested in it that are still open; the run may have ended itself.
                while mlflow.active_run() and mlflow.get_run(run.info.run_id).info.status == "RUNNING":
                    mlflow.end_run(status)
            raise


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP (a closed terminal) came; raised so that `with` blocks end before the process does."""

    signum: int = signal.SIGTERM
    status: str = "KILLED"


@contextmanager
def terminable() -> Iterator[None]:
    """Turn such a signal into an exception, so that the block cleans up what it must, and then send it again."""

    def handler(signum: int, frame: object) -> None:
        error = Terminated()
        if signum == signal.SIGTERM and torchrun_processes() > 1:
            error = Terminated("by torchrun, as another process has died or torchrun itself was told to stop")
            error.status = "FAILED"
        error.signum = signum
        raise error

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            return before(lost)
        # It came in a `__del__`, where Python drops exceptions.
        signum = getattr(lost.exc_value, "signum", signal.SIGINT)
        threading.Timer(0.1, signal.raise_signal, [signum]).start()

    before, sys.unraisablehook = sys.unraisablehook, hook
    try:
        # One that is ignored stays so, as after `nohup`.
        with signals({signum: handler for signum in ENDS if signal.getsignal(signum) != signal.SIG_IGN}):
            yield
    except Terminated as error:
        os.kill(os.getpid(), error.signum)
        raise
    finally:
        sys.unraisablehook = before


@contextmanager
def signals(handlers: Mapping[int, Any]) -> Iterator[None]:
    """Handle signals like this in the block, in the main thread: no other can."""
    here = threading.current_thread() is threading.main_thread()
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items() if here}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def log_config(config: Config, exclude: Collection[str] = ()) -> None:
    """Log the fields as parameters of the active run, except those that `mlflow run` has logged, as text."""
    logged = mlflow.get_run(mlflow.active_run().info.run_id).data.params
    mlflow.log_params(config.model_dump(exclude={*exclude, *logged}))


def log_datasets(data: FashionData) -> None:
    """Link the active run to the training and validation images it uses, with their digests."""
    from demo_lib.data import ADDRESS

    for context, split in {"training": data.train, "validation": data.validation}.items():
        dataset = from_numpy(split.images.numpy(), ADDRESS, targets=split.labels.numpy(), name=data.name)
        mlflow.log_input(dataset, context=context)


def log_model(model: nn.Module, name: str, example: Tensor, **kwargs: Any) -> ModelInfo:
    """Log the model with its signature, an input example and pinned requirements, and return what MLflow made of it.

    `example` holds at least two images, float32 of shape (B, 1, 28, 28): torch.export freezes a batch of one.
    """
    model = copy.deepcopy(model).cpu().eval()
    pins = [f"{package}=={version(package)}" for package in ("torch", "torchvision", "mlflow")]
    return mlflow.pytorch.log_model(model, name=name, input_example=example.numpy(), pip_requirements=pins, **kwargs)


def _source() -> dict[str, str]:
    if MLFLOW_RUN_ID.get():
        return {}
    connected = MLFLOW_EXPERIMENT_ID.get()
    name = MlflowClient().get_experiment(connected).name.rpartition("/")[2] if connected else ""
    notebook = LESSONS / f"{name}.ipynb"
    if notebook.is_file():
        return {"mlflow.source.name": f"notebooks/{notebook.name}", "mlflow.source.type": "NOTEBOOK"}
    program, *arguments = sys.argv
    if Path(program).name == "__main__.py":
        program = f"python -m {Path(program).parent.name}"
    return {"mlflow.source.name": " ".join([program, *map(without_login, arguments)]), "mlflow.source.type": "LOCAL"}


def _commit() -> dict[str, str]:
    try:
        # Not what a hook of git, which sets these, is about.
        with (
            git.Repo(ROOT) as repository,
            repository.git.custom_environment(GIT_DIR=repository.git_dir, GIT_WORK_TREE=str(repository.working_dir)),
        ):
            commit, dirty = repository.head.commit.hexsha, str(repository.is_dirty()).lower()
        return {"mlflow.source.git.commit": commit, "git_dirty": dirty}
    except (git.exc.GitError, ValueError, OSError):  # no repository, no commit yet, no git, or not ours to read
        return {}
