"""What lies in the store that exercises are judged by: read, and never changed."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, wraps
from typing import Any

from demo_lib.store import metric_histories, own_name

import mlflow
import yaml
from mlflow import MlflowClient, MlflowException
from mlflow.entities import FileInfo, LoggedModel, Metric, Run, Trace, ViewType
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model

# A private part of MLflow, as in MLflow 3.17.2: see `tests/unit/test_internals.py`.
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # isort: skip

EXPERIMENT = "exercises"
PARENT = "mlflow.parentRunId"
MANY = 100_000
LARGE = 500_000  # bytes of a file that is not read: a check is quick
SPANS = "mlflow.trace.spansLocation"
YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where it was built


def _kept(read: Callable) -> Callable:
    """Let a method read each thing once: what it returned is returned again for the same arguments."""

    @wraps(read)
    def found(self: "Evidence", *asked: Any) -> Any:
        if (key := (read, *asked)) not in self._answers:
            self._answers[key] = read(self, *asked)
        return self._answers[key]

    return found


class Evidence:
    """One person's part of the store: each thing is read when a check first asks for it, and then kept.

    `place` returns the id of the person's experiment of that name, None if there is none. Of somebody else's (not
    `own`) only files are read that lie where the server puts them: an address that a person chose could lead to this
    machine's disk, or send the reader's password elsewhere.
    """

    def __init__(self, place: Callable[[str], str | None], own: bool = True) -> None:
        self.place = place
        self.own = own
        self._answers: dict[tuple, Any] = {}
        self._made: dict[str, list[ModelVersion]] = {}
        self._runs: dict[str, list[Run]] = {}
        self._flushed = False

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client, made late: it would make a store where none is."""
        return MlflowClient()

    @property
    def runs(self) -> list[Run]:
        """The runs of the experiment `exercises`, the latest first."""
        return self.runs_of(EXPERIMENT)

    def runs_of(self, experiment: str) -> list[Run]:
        """Return the runs of one of the person's experiments, the latest first; none if it is not there."""
        return self.runs_by_experiment([experiment])[experiment]

    def runs_by_experiment(self, experiments: Iterable[str]) -> dict[str, list[Run]]:
        """Return the runs of several experiments by one request; else as `runs_of`."""
        new: dict[str, list[Run]] = {each: [] for each in experiments if each not in self._runs}
        name_of = {number: each for each in new if (number := self.place(each))}
        for run in self.search([*name_of]):
            new[name_of[run.info.experiment_id]].append(run)
        self._runs |= new
        return {each: self._runs[each] for each in experiments}

    def search(self, numbers: Sequence[str], where: str = "", view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
        """Return the runs of these experiments, by id, that pass the filter."""
        return mlflow.search_runs([*numbers], where, view, MANY, output_format="list") if numbers else []

    def tagged(self, number: str) -> list[Run]:
        """Return the runs that were tagged as attempts at the exercise, the latest first."""
        return [run for run in self.runs if run.data.tags.get("exercise", "").strip() == number]

    def tops(self, number: str) -> list[Run]:
        """Return the tagged runs; tagged children stand for nothing where a tagged run is their parent."""
        tagged = self.tagged(number)
        known = {run.info.run_id for run in tagged}
        return [run for run in tagged if run.data.tags.get(PARENT) not in known]

    def children(self, run: Run) -> list[Run]:
        """Return the runs nested in this one, the first first."""
        return self._families[run.info.run_id]

    @cached_property
    def _families(self) -> dict[str, list[Run]]:
        found = defaultdict(list)
        for run in reversed(self.runs):
            found[run.data.tags.get(PARENT)].append(run)
        return found

    @_kept
    def run(self, run_id: str | None) -> Run | None:
        """Return the run with all that belongs to it, None if there is none of this id that is not deleted."""
        if run_id in self._own_runs:
            return self._own_runs[run_id]
        with suppress(TypeError), _if_there():  # also for an id that is none, and another person's run
            found = self.client.get_run(run_id)
            return found if found.info.lifecycle_stage == "active" else None
        return None

    @_kept
    def history(self, run: Run, metric: str) -> list[Metric]:
        """Return all values of the run's metric by step, of one step by time; none if it has no such metric."""
        if metric not in run.data.metrics:
            return []
        found = None if self.own else self._histories(metric).get(run.info.run_id)
        if found is None:
            found = self.client.get_metric_history(run.info.run_id, metric)
        return sorted(found, key=lambda point: (point.step, point.timestamp))

    @_kept
    def _histories(self, metric: str) -> dict[str, list[Metric]]:
        """Return the metric's histories of all runs of `exercises`: a class has too many to ask for them one by one."""
        ids = [run.info.run_id for run in self.runs if metric in run.data.metrics]
        found = (metric_histories(some, metric) for some in _portions(ids))
        return {run_id: points for each in found for run_id, points in each.items()}

    def models(self, run: Run) -> list[LoggedModel]:
        """Return the whole models that the run logged, the first first."""
        return [model for model in reversed(self._models) if model.source_run_id == run.info.run_id]

    @cached_property
    def _models(self) -> list[LoggedModel]:
        place = self.place(EXPERIMENT)
        found = mlflow.search_logged_models([place], output_format="list") if place else []
        return [model for model in found if model.status == "READY"]

    def model_step(self, model: LoggedModel) -> int | None:
        """Return the step at which the run logged the model."""
        run = self.run(model.source_run_id)
        outputs = run.outputs.model_outputs if run and run.outputs else []
        return next((each.step for each in outputs if each.model_id == model.model_id), None)

    @_kept
    def description(self, model: LoggedModel) -> Model | None:
        """Return what the model's file MLmodel says of it, None without a readable one; none of its code runs."""
        with suppress(Exception):  # it can hold anything
            if any(each.path == "MLmodel" and (each.file_size or 0) < LARGE for each in self.files(model)):
                text = mlflow.artifacts.load_text(f"{model.artifact_location}/MLmodel")
                return Model.from_dict(yaml.load(text, YAML))
        return None

    @_kept
    def files(self, thing: Run | LoggedModel, folder: str | None = None) -> list[FileInfo]:
        """Return the files and folders of the run or the model, or of one of its folders."""
        of_run = isinstance(thing, Run)
        address = thing.info.artifact_uri if of_run else thing.artifact_location
        place = thing.info.experiment_id if of_run else thing.experiment_id
        if self.own or (f"{address}/".startswith(f"mlflow-artifacts:/{place}/") and ".." not in address):
            return get_artifact_repository(address).list_artifacts(folder)
        return []

    @cached_property
    def _own_runs(self) -> dict[str, Run]:
        return {run.info.run_id: run for run in self.runs}

    def versions(self, number: str) -> list[ModelVersion]:
        """Return the registered versions tagged as attempts whose model a run of `exercises` made, the latest first."""
        return [each for each in reversed(self.versions_of(self.runs)) if each.tags.get("exercise") == number]

    @_kept
    def search_versions(self, where: str) -> list[ModelVersion]:
        """Return all registered versions that pass the filter, also other people's."""
        found, token = [], None
        while token != "":
            page = self.client.search_model_versions(where, max_results=1000, page_token=token)
            found += page
            token = page.token or ""
        return found

    def scored(self, run: Run, metric: str) -> set[str]:
        """Return the ids of the models, known in `exercises`, for which the run logged the metric."""
        mine = metric, run.info.run_id
        return {each.model_id for each in self._models if mine in {(m.key, m.run_id) for m in each.metrics or ()}}

    def versions_of(self, runs: Sequence[Run]) -> list[ModelVersion]:
        """Return the registered versions whose models these runs made, the first first."""
        ids = {run.info.run_id for run in runs}
        if new := ids - self._made.keys():
            made = {run_id: [] for run_id in new | (self._own_runs.keys() - self._made.keys())}
            for some in _portions([*made]):
                for version in self.search_versions(f"run_id IN ({str(some)[1:-1]})"):
                    made[version.run_id].append(version)
            self._made |= made
        found = (version for run_id in ids for version in self._made[run_id])
        return sorted(found, key=lambda version: version.creation_timestamp)

    @_kept
    def aliases(self, name: str) -> dict[str, str]:
        """Return which version each alias of the registered model names; none if it is not there, or not yours."""
        with _if_there():
            return {alias: str(number) for alias, number in self.client.get_registered_model(name).aliases.items()}
        return {}

    def text(self, run: Run, path: str) -> str | None:
        """Return the text of one of the run's files, None if it has no such file, a large one, or one not in UTF-8."""
        found = next((each for each in self.files(run) if each.path == path and not each.is_dir), None)
        if found is None or (found.file_size or 0) > LARGE:
            return None
        with suppress(UnicodeDecodeError, OSError, MlflowException):
            return mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{path}")
        return None

    def traces(self, run: Run, wait: bool = True) -> list[Trace]:
        """Return the run's traces with their spans, a hundred at most; wait first for those still to be written."""
        flush, self._flushed = wait and not self._flushed, self._flushed or wait  # it takes seconds after a trace
        about = {"locations": [run.info.experiment_id], "run_id": run.info.run_id, "max_results": 100, "flush": flush}
        # In the database, that is: other spans are fetched, with the reader's password, from where the trace says.
        return self.client.search_traces(filter_string=f"tags.`{SPANS}` = 'TRACKING_STORE'", **about)

    def untagged_version(self) -> ModelVersion | None:
        """Return the person's latest version that neither an exercise nor its setup has tagged."""
        found = (each for each in reversed(self.versions_of(self.runs)) if not {"exercise", "setup"} & each.tags.keys())
        return next(found, None)

    def version(self, name: str, number: str | None) -> ModelVersion | None:
        """Return the registered version, None if it is not there."""
        for version in self.versions_of(self.runs):
            if (version.name, str(version.version)) == (name, number):
                return version
        with _if_there():
            return self.client.get_model_version(name, number) if number else None
        return None

    def model_of(self, version: ModelVersion) -> LoggedModel | None:
        """Return the whole model of the experiment `exercises` that the version points to."""
        return next((each for each in self._models if version.source == f"models:/{each.model_id}"), None)


@contextmanager
def _if_there() -> Iterator[None]:
    """Pass over that something is not there or not to be seen, but not that the store does not answer."""
    try:
        yield
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED"):
            raise


def _portions(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield a hundred ids at a time: they go into a request's address."""
    return (ids[first : first + 100] for first in range(0, len(ids), 100))


def metrics_of(model: LoggedModel) -> dict[str, float]:
    """Return the latest values of the model's own metrics."""
    latest = sorted(model.metrics or (), key=lambda metric: (metric.step, metric.timestamp))
    return {metric.key: metric.value for metric in latest}


def model_id(version: ModelVersion) -> str:
    """Return the id of the model that was registered: a search leaves the version's own `model_id` empty."""
    return (version.source or "").rpartition("/")[2]


def of_this_login() -> Evidence:
    """Return the evidence of whoever asks: the experiments that `connect` would choose."""

    def place(experiment: str) -> str | None:
        found = MlflowClient().get_experiment_by_name(own_name(experiment))
        return found.experiment_id if found and found.lifecycle_stage == "active" else None

    return Evidence(place)
