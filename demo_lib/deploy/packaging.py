"""Models for others to use: the classifier around a network, and what MLflow says when it refuses one."""

import textwrap
from importlib.metadata import version
from pathlib import Path

from demo_lib.data import CLASSES, Split

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, Schema, TensorSpec

CODE = Path(__file__).with_name("classifier.py")
SIGNATURE = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, 28, 28))]),
    outputs=Schema([ColSpec("string", "label"), *(ColSpec("float", name) for name in CLASSES)]),
)


def log_classifier(network_uri: str) -> ModelInfo:
    """Log the classifier around a logged network, as lesson 04 does step by step, and return what MLflow made of it."""
    return mlflow.pyfunc.log_model(
        name="classifier",
        python_model=str(CODE),
        artifacts={"network": network_uri},
        model_config={"classes": list(CLASSES)},
        signature=SIGNATURE,
        input_example=np.zeros((2, 28, 28), np.uint8),
        pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "torch", "numpy", "pandas")],
    )


def reason(error: Exception | str) -> str:
    """Return the first line of why MLflow or a model refused, 200 characters at most, without the data it repeats."""
    text = str(error).strip() or type(error).__name__
    # "Failed to enforce schema of data '[[0 0 ...]]'. Error: Shape of input ... does not match ..."
    return textwrap.shorten(text.rpartition("]'. Error: ")[2].splitlines()[0], 200, placeholder=" ...")


def raw_images(split: Split) -> np.ndarray:
    """Return the split's images as the classifier takes them: uint8 of shape (N, 28, 28)."""
    return split.images.squeeze(1).numpy()
