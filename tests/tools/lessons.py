"""The lessons' notebooks, for tests."""

from demo_lib.batch import LESSONS

import papermill as pm
import yaml


def defaults(name):
    """Return the default values of the lesson's parameters."""
    inspected = pm.inspect_notebook(LESSONS / f"{name}.ipynb")
    return {parameter: yaml.safe_load(each["default"]) for parameter, each in inspected.items()}
