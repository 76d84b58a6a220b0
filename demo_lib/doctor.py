"""Check that this machine can run the lessons, and say what to fix."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from demo_lib.config import DemoError, settings, tracking_uri

from jupyter_client import KernelManager
from jupyter_client.kernelspec import NoSuchKernel

NEEDED_GB = 1  # runs, models and executed notebooks of a few workshops


@dataclass(frozen=True)
class Finding:
    """What one check found: fine, or what to do."""

    name: str
    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FIX '}  {self.name:8}  {self.text}"


def examine() -> list[Finding]:
    """Run every check; one that fails does not keep the others from running."""
    checks = {
        "python": _python,
        "packages": _packages,
        "kernel": _kernel,
        "data": _data,
        "store": _store,
        "ui port": _port,
        "disk": _disk,
        "cores": _cores,
    }
    return [_examine_one(name, check) for name, check in checks.items()]


def _examine_one(name: str, check: Callable[[], tuple[bool, str]]) -> Finding:
    try:
        return Finding(name, *check())
    except (DemoError, OSError) as error:
        return Finding(name, False, str(error))


def _python() -> tuple[bool, str]:
    return True, f"{sys.version.split()[0]} in {sys.prefix}"


def _packages() -> tuple[bool, str]:
    try:
        import torch  # noqa: F401
        import torchvision  # noqa: F401  (the import is the check: a mismatched pair fails here)
    except (ImportError, RuntimeError, OSError) as error:
        return False, f"torch and torchvision don't fit together ({error}): install both from the same index."
    names = ("mlflow", "torch", "torchvision", "optuna", "papermill", "jupyterlab")
    return True, ", ".join(f"{name} {version(name)}" for name in names)


def _kernel() -> tuple[bool, str]:
    fix = "run `python -m ipykernel install --sys-prefix`."
    try:
        python = KernelManager(kernel_name="python3").format_kernel_cmd()[0]
    except NoSuchKernel:
        return False, f"there is no kernel python3: {fix}"
    if Path(shutil.which(python) or python).parent.resolve() != Path(sys.executable).parent.resolve():
        return False, f"python3 runs {python}, not {sys.executable}: {fix}"
    return True, f"python3 runs {python}"


def _data() -> tuple[bool, str]:
    from demo_lib.data import find_data

    source = find_data()
    return True, f"{source.name} from {source.text} ({source.folder})"


def _store() -> tuple[bool, str]:
    from demo_lib.tracking import connect

    connect("00_start_here")
    return True, tracking_uri()


def _port() -> tuple[bool, str]:
    from demo_lib.processes import port_user

    port = settings().ui_port
    user = port_user(port)
    if user == "other":
        return False, f"another program listens on {port}: set DEMO_UI_PORT to a free port."
    return True, f"{port} {'has the MLflow UI' if user == 'mlflow' else 'is free'}"


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(settings().home).free / 1e9
    text = f"{free:.1f} GB free in {settings().home}"
    return free >= NEEDED_GB, text if free >= NEEDED_GB else f"{text}: free {NEEDED_GB} GB or set DEMO_HOME elsewhere."


def _cores() -> tuple[bool, str]:
    from demo_lib.config import TrainConfig
    from demo_lib.training import pick_device

    import torch

    device, threads = pick_device(TrainConfig()), torch.get_num_threads()
    return True, f"{os.cpu_count()} cores; PyTorch trains on {device} with {threads} thread{'s'[: threads - 1]}"
