"""The steps of copying runs from this store to another: each looks what is there already, and does what is left."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from demo_lib.ops.originals import (
    Original,
    datasets_of,
    files_of,
    key_of,
    made_models,
    models_of,
    points_of,
    used_models,
)
from demo_lib.store import Login, own_model_name, signed_in

import mlflow
import yaml
from mlflow import MlflowClient, MlflowException
from mlflow.entities import (
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)

ORIGIN = "copied_from"  # the tag of a copy with the id of its original
PARENT, PROCESS, VERSIONS = "mlflow.parentRunId", "process", "mlflow.modelVersions"


@dataclass
class Copying:
    """A family on its way: first all its runs and models `begin`, then each run is filled."""

    target: MlflowClient
    experiment_id: str
    login: Login
    source: MlflowClient = field(default_factory=MlflowClient)
    ids: dict[str, str] = field(default_factory=dict)  # of the copies, by the ids of their originals
    models: dict[str, LoggedModel] = field(default_factory=dict)  # the originals whose copies are known

    def begin(self, original: Original) -> None:
        """Find or make the copies of the run and of the models that it logged, those with their files."""
        run, old = original.run, original.run.info.run_id
        tags = {key: value for key, value in self._tags(run.data.tags, old).items() if key != PROCESS}
        with signed_in(self.login):
            found = self.target.search_runs([self.experiment_id], f"tags.{ORIGIN} = '{old}'")
            made = found or [self.target.create_run(self.experiment_id, run.info.start_time, tags, run.info.run_name)]
        self.ids[old] = made[0].info.run_id
        for model in original.models:
            self._copy_model(model)
        for each in used_models(run):
            self._find_model(each.model_id)

    def fill(self, original: Original) -> None:
        """Log what the copy of the run lacks. Its status comes last but for the tags."""
        run, new = original.run, self.ids[original.run.info.run_id]
        points = points_of(self.source, run)
        with signed_in(self.login):
            copy = self.target.get_run(new)
            self._log_points(points, copy, run.info.run_id)
            params = [Param(*each) for each in run.data.params.items() if each[0] not in copy.data.params]
            self.target.log_batch(new, params=params, synchronous=True)
            self._log_inputs(run, copy)
        end = (run.info.status, run.info.end_time)
        ended = (copy.info.status, copy.info.end_time) == end and run.info.status != "RUNNING"
        lists = (self.source.list_artifacts, self.target.list_artifacts)
        with self._lacking_files(run.info.artifact_uri, run.info.run_id, new, *lists, trusted=ended) as folder:
            if folder:
                self.target.log_artifacts(new, str(folder))
        with signed_in(self.login):
            if (copy.info.status, copy.info.end_time) != end:
                if end[1]:
                    self.target.set_terminated(new, *end)
                else:
                    self.target.update_run(new, end[0])
            tags = self._tags(run.data.tags, run.info.run_id)
            if run.info.status == "RUNNING":  # with the tag, the copy would count as left behind by a process
                tags.pop(PROCESS, None)
            changed = [RunTag(*each) for each in tags.items() if copy.data.tags.get(each[0]) != each[1]]
            self.target.log_batch(new, tags=changed, synchronous=True)

    def register(self, original: Original, owner: str) -> None:
        """Register the versions that are not yet; `owner` begins the names of this login's models here."""
        for version in original.versions:
            model = next(each for each in original.models if version.source in (each.model_uri, each.artifact_location))
            registered, old = self.source.get_registered_model(version.name), f"{version.name}/{version.version}"
            model_id, run_id = self.ids[model.model_id], self.ids[original.run.info.run_id]
            with signed_in(self.login):
                name = own_model_name(version.name.removeprefix(owner), self.target.tracking_uri)
                known = self.target.search_model_versions(f"run_id = '{run_id}'")
                if any(each.tags.get(ORIGIN) == old for each in known):
                    continue
                try:
                    self.target.create_registered_model(name, registered.tags, registered.description)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                here, tags, about = mlflow.get_tracking_uri(), version.tags | {ORIGIN: old}, version.description
                source = f"models:/{model_id}"
                mlflow.set_tracking_uri(self.target.tracking_uri)  # a SQLite store looks there for the model
                try:
                    self.target.create_model_version(name, source, run_id, tags, description=about, model_id=model_id)
                finally:
                    mlflow.set_tracking_uri(here)

    def _tags(self, tags: dict[str, str], old: str) -> dict[str, str]:
        """Return the tags of the copy: ids of originals are those of the copies, and no parent is left behind."""
        kept = {key: self.ids.get(value, value) for key, value in tags.items() if key != PARENT or value in self.ids}
        return {key: value for key, value in kept.items() if key != VERSIONS} | {ORIGIN: old}

    def _find_model(self, old: str) -> LoggedModel | None:
        """Return the copy of the model, if there is one, and note it."""
        with signed_in(self.login):
            found = models_of(self.target, self.experiment_id, f"tags.{ORIGIN} = '{old}'")
        if not found:
            return None
        self.ids[old] = found[0].model_id
        with suppress(MlflowException):  # the original is deleted
            self.models.setdefault(old, self.source.get_logged_model(old))
        return found[0]

    def _copy_model(self, model: LoggedModel) -> None:
        run_id, tags = self.ids[model.source_run_id], self._tags(model.tags, model.model_id)
        if (copy := self._find_model(model.model_id)) is None:
            with signed_in(self.login):
                copy = self.target.create_logged_model(
                    self.experiment_id, model.name, run_id, tags, model.params, model.model_type
                )
        self.ids[model.model_id], self.models[model.model_id] = copy.model_id, model
        with signed_in(self.login):
            if changed := {key: value for key, value in tags.items() if copy.tags.get(key) != value}:
                self.target.set_logged_model_tags(copy.model_id, changed)
            if lacking := {key: value for key, value in model.params.items() if key not in copy.params}:
                self.target.log_model_params(copy.model_id, lacking)
        if copy.status != LoggedModelStatus.PENDING:  # it was copied whole
            return
        lists = (self.source.list_logged_model_artifacts, self.target.list_logged_model_artifacts)
        with self._lacking_files(model.artifact_location, model.model_id, copy.model_id, *lists) as folder:
            if folder:
                _rename(folder / "MLmodel", model, copy, run_id)
                self.target.log_model_artifacts(copy.model_id, str(folder))
        if model.status != LoggedModelStatus.PENDING:
            with signed_in(self.login):
                self.target.finalize_logged_model(copy.model_id, model.status)

    def _log_points(self, points: list[Metric], copy: Run, old: str) -> None:
        """Log the points that the copy lacks, and those that belong to a model."""
        new, nans = copy.info.run_id, {key_of(each)[:3] for each in points if math.isnan(each.value)}
        there, lacking = {key_of(each) for each in points_of(self.target, copy)}, []
        for model in self.models.values():
            model_id = self.ids[model.model_id]
            if own := [each for each in model.metrics or () if each.run_id == old]:
                copied = self.target.get_logged_model(model_id).metrics or ()
                has = {key_of(each)[:3] for each in copied if each.run_id == new}
                for each in own:
                    # MLflow keeps a model's NaN as 0, and the run's as it is.
                    value = math.nan if each.value == 0 and key_of(each)[:3] in nans else each.value
                    about = (value, each.timestamp, each.step, model_id, each.dataset_name, each.dataset_digest)
                    if key_of(each)[:3] not in has:
                        lacking.append(Metric(each.key, *about))
        known = there | {key_of(each) for each in lacking}
        lacking += [
            Metric(each.key, each.value, each.timestamp, each.step) for each in points if key_of(each) not in known
        ]
        self.target.log_batch(new, lacking, synchronous=True)

    def _log_inputs(self, run: Run, copy: Run) -> None:
        """Link the datasets and models that the copy lacks as inputs, and models as outputs."""
        new, there = copy.info.run_id, [(each.dataset.name, each.dataset.digest) for each in datasets_of(copy)]
        datasets = [each for each in datasets_of(run) if (each.dataset.name, each.dataset.digest) not in there]
        known = {each.model_id for each in used_models(copy)}
        ids = [self.ids[each.model_id] for each in used_models(run) if each.model_id in self.ids]
        models = [LoggedModelInput(each) for each in ids if each not in known]
        if datasets or models:
            self.target.log_inputs(new, datasets, models)
        made = {each.model_id for each in made_models(copy)}
        outputs = [(self.ids[each.model_id], each.step) for each in made_models(run) if each.model_id in self.ids]
        if outputs := [LoggedModelOutput(*each) for each in outputs if each[0] not in made]:
            self.target.log_outputs(new, outputs)

    @contextmanager
    def _lacking_files(
        self, address: str, old: str, new: str, here: Callable, there: Callable, trusted: bool = True
    ) -> Iterator[Path | None]:
        """Give a folder with the files that the copy lacks, to a block with its login; None if it lacks nothing.

        With `trusted`, a file with the same path and size is the same.
        """
        wanted = files_of(here, old)
        with signed_in(self.login):
            found = files_of(there, new).items() if trusted else ()
        same = wanted.items() & found
        with TemporaryDirectory() as temporary:
            folder = None
            if len(same) < len(wanted):
                folder = Path(mlflow.artifacts.download_artifacts(address, dst_path=temporary))
                for path, _ in same:
                    (folder / path).unlink()
            with signed_in(self.login):
                yield folder


def _rename(file: Path, model: LoggedModel, copy: LoggedModel, run_id: str) -> None:
    """Put the copy's ids and place into the file MLmodel."""
    if file.exists():
        new = {model.model_id: copy.model_id, model.source_run_id: run_id}
        new[model.artifact_location] = copy.artifact_location
        values = yaml.safe_load(file.read_text("utf-8"))
        values = {key: new.get(value, value) if isinstance(value, str) else value for key, value in values.items()}
        file.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
