"""Check that this machine can run the lessons, and say what to fix."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from demo_lib.config import DemoError, TrainConfig, settings, tracking_uri
from demo_lib.ops.processes import Finding, examine_one, port_user

from jupyter_client import KernelManager
from jupyter_client.kernelspec import NoSuchKernel

PACKAGES = ("mlflow", "torch", "torchvision", "optuna", "papermill", "jupyterlab")


def examine() -> list[Finding]:
    """Run every check; one that fails does not keep the others from running."""
    checks = {"python": lambda: f"{sys.version.split()[0]} in {sys.prefix}", "packages": _packages, "kernel": _kernel}
    checks |= {"data": _data, "store": _store, "ui port": _port, "disk": _disk, "cores": _cores}
    return [examine_one(name, check) for name, check in checks.items()]


def _packages() -> str:
    try:
        import torch  # noqa: F401
        import torchvision  # noqa: F401  (the import is the check: a mismatched pair fails here)
    except (ImportError, RuntimeError, OSError) as error:
        raise DemoError(f"torch and torchvision don't fit ({error}): install both from the same index.") from None
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


def _kernel() -> str:
    fix = "run `python -m ipykernel install --sys-prefix`."
    try:
        python = KernelManager(kernel_name="python3").format_kernel_cmd()[0]
    except NoSuchKernel:
        raise DemoError(f"there is no kernel python3: {fix}") from None
    if Path(shutil.which(python) or python).parent.resolve() != Path(sys.executable).parent.resolve():
        raise DemoError(f"python3 runs {python}, not {sys.executable}: {fix}")
    return f"python3 runs {python}"


def _data() -> str:
    from demo_lib.data import find_data

    source = find_data()
    return f"{source.name} from {source.source}"


def _store() -> str:
    from demo_lib.store import connect

    connect("00_start_here")
    return tracking_uri()


def _port() -> str:
    port = settings().ui_port
    if (user := port_user(port)) == "other":
        raise DemoError(f"another program listens on {port}: set DEMO_UI_PORT to a free port.")
    return f"{port} {'has the MLflow UI' if user == 'mlflow' else 'is free'}"


def _disk() -> str:
    free = shutil.disk_usage(settings().home).free / 1e9
    text = f"{free:.1f} GB free in {settings().home}"
    if free < 1:  # runs, models and executed notebooks of a few workshops
        raise DemoError(f"{text}: free 1 GB or set DEMO_HOME elsewhere.")
    return text


def _cores() -> str:
    from demo_lib.training import pick_device

    import torch

    device, threads = pick_device(TrainConfig()), torch.get_num_threads()
    return f"{os.cpu_count()} cores; PyTorch trains on {device} with {threads} thread{'s'[: threads - 1]}"
