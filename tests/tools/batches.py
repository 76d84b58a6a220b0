"""Notebooks for batches, and the runs and processes of a batch."""

import re
from pathlib import Path

from demo_lib.config import tracking_uri

import mlflow
import nbformat
from mlflow import MlflowClient
from mlflow.entities import Run
from nbformat.v4 import new_code_cell, new_notebook

from tests.tools.processes import find_processes

KERNELSPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}


def write_notebook(folder: Path, name: str, *cells: str) -> str:
    """Write a notebook of code cells, the first of them tagged `parameters`, and return its path."""
    made = [new_code_cell(cell) for cell in cells]
    made[0].metadata["tags"] = ["parameters"]
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=made, metadata={"kernelspec": KERNELSPEC}), path)
    return str(path)


def runs_of_batch() -> tuple[Run, dict[str, Run]]:
    """Return the parent run of the only batch of the store, and its child runs by name; no two have one name."""
    mlflow.set_tracking_uri(tracking_uri())
    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("batch").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    assert len(children) == len(runs) - 1
    return parent, children


def batch_id(output: str) -> str:
    """Return the batch's id from what it has printed."""
    return re.search(r"^batch ([0-9a-f]{32})$", output, re.MULTILINE)[1]


def kernels_of(batch_id: str) -> list[int]:
    """Return the ids of the processes that live and have the batch's id in their environment."""
    return find_processes({"DEMO_BATCH_ID": batch_id}, "")
