"""Models for others to use: the classifier around a network, and how often it is right."""

from __future__ import annotations

import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo_lib.config import DemoError
from demo_lib.data import CLASSES, Split

import mlflow
import numpy as np
import requests
import torch
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


class PackageError(DemoError):
    """There is no model at an address, or none that can be packaged."""


def log_classifier(network_uri: str, name: str = "classifier", **kwargs: Any) -> ModelInfo:
    """Log the classifier around a logged network, as lesson 04 does step by step, and return what MLflow made of it.

    It takes uint8 images of shape (N, 28, 28). `network_uri` is a model's address such as `models:/m-...`. Without an
    active run the model belongs to none, and nobody can tell from it what it was trained on.

    Raises:
        PackageError: there is no model at that address, or it is no network that takes any number of images and
            returns a logit for each class.
    """
    _try(network_uri)
    requirements = [f"{package}=={version(package)}" for package in ("mlflow", "torch", "numpy", "pandas")]
    return mlflow.pyfunc.log_model(
        name=name,
        python_model=str(CODE),
        artifacts={"network": network_uri},
        model_config={"classes": list(CLASSES)},
        signature=SIGNATURE,
        input_example=np.zeros((2, 28, 28), np.uint8),
        pip_requirements=requirements,
        **kwargs,
    )


def find_model(model_uri: str) -> ModelInfo:
    """Return what MLflow knows about the model at the address; a failure of the store is passed on unchanged.

    Raises:
        PackageError: there is no model at that address.
    """
    try:
        return mlflow.models.get_model_info(model_uri)
    except (MlflowException, OSError, AttributeError, ValueError) as error:
        if is_of_the_store(error):
            raise
        raise PackageError(
            f"there is no model at {model_uri!r}: give a model's address, such as models:/m-... or models:/NAME@ALIAS."
        ) from None


def is_of_the_store(error: Exception) -> bool:
    """Whether the store failed, and not the model: a server that is down says nothing about it."""
    if isinstance(error, MlflowException):
        return error.error_code not in MISSING
    return isinstance(error, requests.RequestException)


def reason(error: Exception | str) -> str:
    """Return why MLflow or a model refused: whole sentences or words of the error's first line, 200 characters at most.

    `error` is an error or its message. MLflow repeats the data before it comes to the point: that is left out. An error
    without a text gives its kind.
    """
    text = str(error).strip() or type(error).__name__
    line = text.rpartition("]'. Error: ")[2].splitlines()[0]  # before it are the data and the schema
    sentences = line[:200].rpartition(". ")[0]
    return f"{sentences}." if sentences and len(line) > 200 else textwrap.shorten(line, 200, placeholder=" ...")


def _try(network_uri: str) -> None:
    """Show the network one image and then three: one that was logged with a single image takes no other number."""
    if "pytorch" not in (flavors := find_model(network_uri).flavors):
        raise PackageError(
            f"the model at {network_uri!r} is no PyTorch network (it has {', '.join(flavors)}): give one that "
            "`mlflow.pytorch.log_model` logged."
        )
    network = mlflow.pytorch.load_model(network_uri)
    for count in (1, 3):
        try:
            with torch.inference_mode():
                found = tuple(network(torch.zeros(count, 1, 28, 28)).shape)
        except Exception as error:  # the network's own code may raise anything
            found = reason(error)
        if found != (count, len(CLASSES)):
            raise PackageError(
                f"the network at {network_uri!r} does not return {len(CLASSES)} logits for each of {count} images of "
                f"shape (1, 28, 28) ({found}): log one that does, with an example of two images or more."
            )


def raw_images(split: Split) -> np.ndarray:
    """Return the split's images as the classifier takes them: uint8 of shape (N, 28, 28)."""
    return split.images.squeeze(1).numpy()
