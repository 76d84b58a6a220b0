"""Check that this machine can run the lessons, and say what to fix."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from demo_lib.config import DemoError, TrainConfig, lessons, settings, tracking_uri, without_login
from demo_lib.ops.processes import Finding, examine_all, examine_one

PACKAGES = ("mlflow", "torch", "torchvision", "optuna", "papermill", "jupyterlab")
SECONDS = 10  # a name server that does not answer takes longer


def examine() -> list[Finding]:
    """Run every check; one that fails does not keep the others from running."""
    packages = examine_one("packages", _packages)  # first and alone: it imports what the others use
    return [packages, *examine_all({"data": _data, "store": _store}, SECONDS)]


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


def _store() -> str:
    from demo_lib.store import connect

    connect("00_start_here")
    return without_login(tracking_uri())
