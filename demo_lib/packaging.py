"""Models for others to use: the classifier around a network, and how often it is right."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo_lib.config import DemoError
from demo_lib.data import CLASSES, Split

import mlflow
import numpy as np
from mlflow import MlflowException
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.types import ColSpec, Schema, TensorSpec

CODE = Path(__file__).with_name("classifier.py")
SIGNATURE = ModelSignature(
    inputs=Schema([TensorSpec(np.dtype("uint8"), (-1, 28, 28))]),
    outputs=Schema([ColSpec("string", "label"), *(ColSpec("float", name) for name in CLASSES)]),
)


class PackageError(DemoError):
    """There is no model to package."""


def log_classifier(network_uri: str, name: str = "classifier", **kwargs: Any) -> ModelInfo:
    """Log the classifier around a logged network, as lesson 04 does step by step, and return what MLflow made of it.

    It takes uint8 images of shape (N, 28, 28). `network_uri` is a model's address such as `models:/m-...`. Without an
    active run the model belongs to none, and nobody can tell from it what it was trained on.

    Raises:
        PackageError: there is no model at that address.
    """
    try:
        mlflow.models.get_model_info(network_uri)
    except (MlflowException, OSError, AttributeError):
        raise PackageError(
            f"there is no model at {network_uri!r}: give the address of a logged network, such as models:/m-..."
        ) from None
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


def raw_images(split: Split) -> np.ndarray:
    """Return the split's images as the classifier takes them: uint8 of shape (N, 28, 28)."""
    return split.images.squeeze(1).numpy()
