"""The whole stack imports and fits together; a `+cpu` torch with another index's torchvision does not."""

import subprocess
import sys
from importlib import import_module

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


@pytest.mark.parametrize("module", ["config", "data", "model", "training"])
def test_rooms_that_must_not_know_mlflow_do_not_load_it(module):
    code = f"import demo_lib.{module}, sys; assert not {{'mlflow', 'optuna'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_batch_run_starts_without_pytorch_and_mlflow():
    code = "import demo_lib.batch, sys; assert not {'torch', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import demo_lib.tracking, sys; assert 'torch' not in sys.modules"
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
