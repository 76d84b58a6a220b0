"""Models for others to use: the classifier around a network, and what MLflow says when it refuses one."""

from __future__ import annotations

import textwrap
from importlib.metadata import version
from pathlib import Path

from demo_lib.config import DemoError
from demo_lib.data import CLASSES, Split

import mlflow
import numpy as np
import requests
from mlflow import MlflowException
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, Schema, TensorSpec

MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
CODE = Path(__file__).with_name("classifier.py")
SIGNATURE = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, 28, 28))]),
    outputs=Schema([ColSpec("string", "label"), *(ColSpec("float", name) for name in CLASSES)]),
)


def log_classifier(network_uri: str) -> ModelInfo:
    """Log the classifier around a logged network, as lesson 04 does step by step, and return what MLflow made of it.

    It takes uint8 images of shape (N, 28, 28). `network_uri` is a model's address such as `models:/m-...`.
    """
    return mlflow.pyfunc.log_model(
        name="classifier",
        python_model=str(CODE),
        artifacts={"network": network_uri},
        model_config={"classes": list(CLASSES)},
        signature=SIGNATURE,
        input_example=np.zeros((2, 28, 28), np.uint8),
        pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "torch", "numpy", "pandas")],
    )


def find_model(model_uri: str) -> ModelInfo:
    """Return what MLflow knows about the model at the address; a failure of the store is passed on unchanged.

    Raises:
        DemoError: there is no model at that address.
    """
    try:
        return mlflow.models.get_model_info(model_uri)
    except (MlflowException, OSError, AttributeError, ValueError) as error:
        if is_of_the_store(error):
            raise
        advice = "give a model's address, such as models:/m-... or models:/NAME@ALIAS"
        raise DemoError(f"there is no model at {model_uri!r}: {advice}.") from None


def is_of_the_store(error: Exception) -> bool:
    """Whether the store failed, and not the model: a server that is down says nothing about it."""
    if isinstance(error, MlflowException):
        return error.error_code not in MISSING
    return isinstance(error, requests.RequestException)


def reason(error: Exception | str) -> str:
    """Return why MLflow or a model refused: whole sentences or words of the error's first line, 200 characters at most.

    `error` is an error, of whose kind is told if it has no text, or a message.
    """
    text = str(error).strip() or type(error).__name__
    line = text.rpartition("]'. Error: ")[2].splitlines()[0]  # before it MLflow repeats the data and the schema
    sentences = line[:200].rpartition(". ")[0]
    return f"{sentences}." if sentences and len(line) > 200 else textwrap.shorten(line, 200, placeholder=" ...")


def raw_images(split: Split) -> np.ndarray:
    """Return the split's images as the classifier takes them: uint8 of shape (N, 28, 28)."""
    return split.images.squeeze(1).numpy()
