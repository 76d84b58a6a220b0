"""The lessons' notebooks, for tests."""

from demo_lib.config import LESSONS

import nbformat
import papermill as pm
import yaml

# Values other than the lessons' defaults, and smaller.
OTHER = {
    "train_images": 1_500,
    "epochs": 3,
    "batch_size": 64,
    "learning_rate": 0.005,
    "weight_decay": 0.0,
    "channels": 8,
    "dropout": 0.1,
    "flip": True,
    "log_every": 7,
    "seed": 4,
    "device": "cpu",
    "trials": 5,
    "max_channels": 8,
    "study": "other",
    "min_accuracy": 0.5,
    "min_gain": 0.01,
    "model_name": "other",
    "score_images": 700,
    "timed_calls": 5,
    "traced_calls": 3,
    "steps": 40,
    "workers": 3,
}


def read(name):
    """Return the lesson's notebook."""
    return nbformat.read(LESSONS / f"{name}.ipynb", as_version=4)


def defaults(name):
    """Return the default values of the lesson's parameters."""
    inspected = pm.inspect_notebook(LESSONS / f"{name}.ipynb")
    return {parameter: yaml.safe_load(each["default"]) for parameter, each in inspected.items()}


def params_of(name):
    """Return the other values of the lesson's parameters."""
    return {key: value for key, value in OTHER.items() if key in pm.inspect_notebook(LESSONS / f"{name}.ipynb")}
