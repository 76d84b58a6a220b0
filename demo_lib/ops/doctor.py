"""Check that this machine can run the lessons, and say what to fix."""

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from demo_lib.config import DemoError, TrainConfig, lessons, settings, tracking_uri, without_login
from demo_lib.ops.processes import Finding, examine_all, examine_one

PACKAGES = ("mlflow", "torch", "torchvision", "optuna", "papermill", "jupyterlab")
NEEDED = 500e6  # bytes for a day of lessons: a trained model is half a megabyte, what is made of it several
SECONDS = 10  # a name server that does not answer takes longer


def examine() -> list[Finding]:
    """Run every check; one that fails does not keep the others from running."""
    packages = examine_one("packages", _packages)  # first and alone: it imports what the others use
    return [packages, *examine_all({"data": _data, "store": _store, "disk": _disk}, SECONDS)]


def _packages() -> str:
    try:
        import torch
        import torchvision  # noqa: F401  (the import is the check: a mismatched pair fails here)

        versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    except PackageNotFoundError as error:
        raise DemoError(f"{error.name} is not installed: run `make setup`.") from None
    except (ImportError, RuntimeError, OSError) as error:
        raise DemoError(f"torch and torchvision don't fit ({error}): install both from the same index.") from None
    from demo_lib.training import pick_device

    lessons()
    trains = f"PyTorch trains on {pick_device(TrainConfig())} with {torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"Python {platform.python_version()} with {versions}; {trains}"


def _data() -> str:
    from demo_lib.data import find_data

    source = find_data(download=False)  # it may take minutes
    sample = source.name != "fashion-mnist"
    later = "; the first training tries to download that" if sample and settings().download else ""
    return f"{source.name} from {source.source}{later}"


def _disk() -> str:
    home = settings().home
    there = next(each for each in [home, *home.parents] if each.exists())
    free, place = min((shutil.disk_usage(each).free, each) for each in (Path(tempfile.gettempdir()), there))
    if free < NEEDED:
        raise DemoError(f"{free / 1e6:.0f} MB free in {place}: free {NEEDED / 1e6:.0f} MB, or set DEMO_HOME or TMPDIR.")
    return f"{free / 1e9:.1f} GB free in {place}"


def _store() -> str:
    from demo_lib.store import connect

    connect("00_start_here")
    return without_login(tracking_uri())
