"""Read runs with all that belongs to them: the models that they logged and used, every point, files, versions."""

from collections.abc import Callable
from typing import NamedTuple

from demo_lib.runs import children

from mlflow import MlflowClient
from mlflow.entities import DatasetInput, LoggedModel, LoggedModelInput, LoggedModelOutput, Metric, Run
from mlflow.entities.model_registry import ModelVersion

Point = tuple[str, int, int, str]


class Original(NamedTuple):
    """A run of this store, the models that it logged, the oldest first, and their registered versions."""

    run: Run
    models: list[LoggedModel]
    versions: list[ModelVersion]


def family_of(run_id: str) -> list[Original]:
    """Return the run and all runs nested in it, in any depth; parents first."""
    return [_read(each) for each in _descendants(run_id)]


def _descendants(run_id: str) -> list[str]:
    found = [run_id]
    for each in found:
        found += [child for child in reversed([*children(each)["run_id"]]) if child not in found]
    return found


def _read(run_id: str) -> Original:
    client = MlflowClient()
    run = client.get_run(run_id)  # a search leaves out the models that it used
    models = models_of(client, run.info.experiment_id, f"source_run_id = '{run_id}'")
    sources = {place for each in models for place in (each.model_uri, each.artifact_location)}
    versions = client.search_model_versions(f"run_id = '{run_id}'") if models else []
    versions = [each for each in versions if each.source in sources]
    return Original(run, models, sorted(versions, key=lambda each: (each.name, int(each.version))))


def models_of(client: MlflowClient, experiment_id: str, where: str) -> list[LoggedModel]:
    """Return all logged models of the experiment that pass the filter, the oldest first."""
    found, token = [], None
    while True:
        page = client.search_logged_models([experiment_id], where, page_token=token)
        found, token = [*found, *page], page.token
        if not token:
            return sorted(found, key=lambda each: each.creation_timestamp)


def used_models(run: Run) -> list[LoggedModelInput]:
    """Return the models that are inputs of the run."""
    return (run.inputs and run.inputs.model_inputs) or []


def points_of(client: MlflowClient, run: Run) -> list[Metric]:
    """Return every point of every metric of the run."""
    return [each for name in run.data.metrics for each in client.get_metric_history(run.info.run_id, name)]


def key_of(point: Metric) -> Point:
    """Return what tells a run's points apart: name, time, step and the value as a text, as NaN is not equal to NaN."""
    return point.key, point.timestamp, point.step, repr(point.value)


def files_of(listing: Callable, of: str, folder: str | None = None) -> dict[str, int]:
    """Return the sizes in bytes of a run's or a model's files by path; `listing` lists one folder."""
    found = {}
    for each in listing(of, folder):
        found |= files_of(listing, of, each.path) if each.is_dir else {each.path: each.file_size}
    return found


def datasets_of(run: Run) -> list[DatasetInput]:
    """Return the datasets that are inputs of the run."""
    return (run.inputs and run.inputs.dataset_inputs) or []


def made_models(run: Run) -> list[LoggedModelOutput]:
    """Return the models that are outputs of the run."""
    return (run.outputs and run.outputs.model_outputs) or []
