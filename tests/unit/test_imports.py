"""The whole stack imports and fits together; a `+cpu` torch with another index's torchvision does not."""

import subprocess
import sys
from importlib import import_module

from demo_lib.config import ROOT

import pytest

STACK = ["torch", "torchvision", "mlflow.pytorch", "optuna", "matplotlib.pyplot", "jupyterlab", "papermill", "nbval"]


@pytest.mark.parametrize("name", STACK)
def test_import(name):
    import_module(name)


def test_torchvision_has_its_operators():
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]


# What each module may load; nothing comes along that these don't load themselves.
CONFIG = {"pydantic_settings", "yaml"}
NETWORK = CONFIG | {"filelock", "torch"}
TRACKING = CONFIG | {"filelock", "git", "mlflow", "psutil", "requests", "tqdm"}
TABLES = TRACKING | {"pandas"}
MAY_LOAD = {
    "config": CONFIG,
    "data": NETWORK,
    "model": NETWORK,
    "training": NETWORK,
    "tracking": TRACKING,
    "plots": {"matplotlib.pyplot", "pandas"},
    "runs": TABLES,
    "tuning": NETWORK | TABLES | {"matplotlib.pyplot", "optuna"},
    "packaging": NETWORK | TABLES,
    "registry": NETWORK | TABLES,
    "serving": NETWORK | TABLES,
    "reproduce": NETWORK | TABLES,
    "batch": CONFIG | {"papermill", "tqdm"},
    "projects": CONFIG,
    "processes": CONFIG | {"psutil", "requests"},
    "doctor": CONFIG | {"jupyter_client"},
}


@pytest.mark.parametrize("module", MAY_LOAD)
def test_a_module_loads_no_more_than_it_may(module):
    code = f"""
import demo_lib, sys, {", ".join(MAY_LOAD[module])}
before = {{name.partition(".")[0] for name in sys.modules}} | sys.stdlib_module_names
import demo_lib.{module}
print(*{{name.partition(".")[0] for name in sys.modules}} - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_module_is_in_the_list():
    found = {path.stem for path in (ROOT / "demo_lib").glob("[a-z]*.py")}
    assert found == MAY_LOAD.keys() | {"classifier"}  # part of a logged model, loaded by MLflow


def test_loading_the_data_does_not_load_torchvision(home):
    code = "from demo_lib.data import load_data; load_data(); import sys; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_watches_over_the_server_starts_without_pytorch_and_mlflow():
    code = "import server.process, sys; assert not {'torch', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_demo_lib_keeps_mlflow_quiet_unless_told_otherwise():
    code = (
        "import demo_lib, mlflow, logging; from mlflow.telemetry.client import get_telemetry_client as c;"
        "print(c(), logging.getLogger('mlflow').level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "30"]
    assert not done.stderr
