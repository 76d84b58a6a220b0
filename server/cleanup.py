"""Remove for good what was deleted long enough ago, with what hangs on it, and nothing else."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from demo_lib.config import DemoError

import requests
import sqlalchemy
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.time import get_current_time_millis

# MLflow's private parts: `mlflow gc` itself, and the tables, in which it leaves too much.
from mlflow.cli import _gc_tracking_resources  # isort: skip
from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL  # isort: skip
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # isort: skip
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion  # isort: skip
from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlLoggedModel, SqlRun, SqlTag  # isort: skip
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # isort: skip

from server.client import as_admin, call
from server.database import database_address
from server.process import read_state
from server.settings import ServerSettings

PROXIED = "mlflow-artifacts:/"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Cleanup:
    """What goes, by id, and the sentences about what stays because the registry needs it."""

    runs: list[str]
    models: list[str]
    experiments: list[str]
    kept: list[str]
    freed: int  # bytes, of artifacts in a folder

    def __str__(self) -> str:
        counts = f"{len(self.runs)} runs, {len(self.models)} models and {len(self.experiments)} experiments"
        return f"{counts}, {self.freed / 1e6:.1f} MB of artifacts."


def clean_up(settings: ServerSettings, older_than: str, dry_run: bool = False) -> Cleanup:
    """Remove what was deleted longer ago than `older_than`, such as 30d, while the server runs; return what that was.

    Plain `mlflow gc` fails here or takes too much: it leaves the children of deleted runs behind, refuses all if a
    run was deleted later than its experiment, leaves the models' files of deleted experiments, and takes models that
    the registry needs; when it is given run ids, it takes every deleted experiment, however new.

    Raises:
        DemoError: no server answers, or it refuses the administrator, or `older_than` is no time.
    """
    if not re.fullmatch(r"[0-9]{1,9}[smhd]", older_than):
        raise DemoError(f"--older-than {older_than!r} is no time: write a number and s, m, h or d, such as 30d.")
    age = int(older_than[:-1]) * UNITS[older_than[-1]] * 1000
    if read_state(settings) is None:
        raise DemoError(f"no server runs in {settings.folder}: start it, as it is what removes artifacts.")
    answer = call(settings, "POST", "/api/2.0/mlflow/experiments/search", json={"max_results": 1})
    if answer.status_code != 200:
        raise DemoError(f"the server refuses the administrator (answer {answer.status_code}): correct the password.")
    store = SqlAlchemyStore(database_address(settings), PROXIED)  # its default would make a folder here
    try:
        found = _find(store.engine, settings.artifact_folder, get_current_time_millis() - age)
        if not dry_run:
            with as_admin(settings):
                _remove(store, found)
    except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        raise DemoError(f"not all could be removed ({reason}): fix that and run it again.") from None
    finally:
        store._dispose_engine()
    return found


def _find(engine: sqlalchemy.Engine, root: Path | None, limit: int) -> Cleanup:
    """Find what was deleted before `limit`, with everything in deleted experiments and below deleted runs."""
    run, model, exp = SqlRun, SqlLoggedModel, SqlExperiment
    with engine.connect() as connection:
        runs = _items(connection, run.run_uuid, run.artifact_uri, run.deleted_time)
        models = _items(connection, model.model_id, model.artifact_location, model.last_updated_timestamp_ms)
        experiments = _items(connection, exp.experiment_id, exp.artifact_location, exp.last_update_time)
        tags = sqlalchemy.select(SqlTag.run_uuid, SqlTag.value).where(SqlTag.key == MLFLOW_PARENT_RUN_ID)
        parents = dict(connection.execute(tags).all())
        registered = _registered(connection)
    old = _due(experiments, limit, set())
    doomed_runs = _due(runs, limit, old)
    doomed_runs |= _below(doomed_runs, parents) & runs.keys()
    items = {each: runs[each] for each in doomed_runs} | {each: models[each] for each in _due(models, limit, old)}
    needed = {each: user for each, item in items.items() if (user := _user(each, item, registered))}
    stay = old & {items[each].experiment for each in needed}
    kept = [f"kept {each}: {user} is made of it; delete that version first." for each, user in needed.items()]
    kept += [f"kept experiment {each}, which has what is kept." for each in stay]
    going = {each: item for each, item in items.items() if each not in needed and item.experiment not in stay}
    places = [item.place for item in going.values() if item.experiment not in old]
    places += [experiments[each].place for each in old - stay]
    freed = sum(_size(root, place) for place in places)
    gone = [str(each) for each in sorted(old - stay)]
    return Cleanup(sorted(runs.keys() & going), sorted(models.keys() & going), gone, kept, freed)


def _remove(store: SqlAlchemyStore, found: Cleanup) -> None:
    """Let `mlflow gc` remove exactly this: its command can't be told to leave, say, all experiments alone."""
    for run_id in set(found.runs).difference(store._get_deleted_runs()):  # gc refuses what is not deleted
        store.delete_run(run_id)
    for model_id in set(found.models).difference(store._get_deleted_logged_models()):
        store.delete_logged_model(model_id)
    for experiment_id in found.experiments:  # first: SQLite gives its number, and so its folder, to the next experiment
        place = store.get_experiment(experiment_id).artifact_location
        if place == f"{PROXIED}{experiment_id}":  # another may be shared
            get_artifact_repository(place).delete_artifacts()
    with redirect_stdout(StringIO()):
        chosen = {"run_ids": list(found.runs), "experiment_ids": found.experiments, "logged_model_ids": found.models}
        skipped = {"skip_experiments": not found.experiments, "skip_logged_models": not found.models}
        _gc_tracking_resources(backend_store=store, older_than=None, time_delta=0, **chosen, **skipped)


def _items(connection: sqlalchemy.Connection, name: Any, place: Any, time: Any) -> dict[int | str, sqlalchemy.Row]:
    """Return runs, models or experiments by id: where artifacts are, when it was deleted or None, its experiment."""
    table = name.class_
    deleted = sqlalchemy.case((table.lifecycle_stage == "deleted", sqlalchemy.func.coalesce(time, 0)))
    columns = {"id": name, "place": place, "deleted": deleted, "experiment": table.experiment_id}
    rows = connection.execute(sqlalchemy.select(*(column.label(label) for label, column in columns.items())))
    return {row.id: row for row in rows}


def _due(items: dict[int | str, sqlalchemy.Row], limit: int, experiments: set[int]) -> set[int | str]:
    """Return what was deleted before `limit`, and what is in these experiments."""
    dead = {each for each, item in items.items() if item.deleted is not None and item.deleted <= limit}
    return dead | {each for each, item in items.items() if item.experiment in experiments}


def _below(runs: set[str], parents: dict[str, str]) -> set[str]:
    """Return all descendants; the tags are the users' own, and may go round in a circle."""
    found, level = set(), set(runs)
    while level:
        level = {child for child, parent in parents.items() if parent in level} - found
        found |= level
    return found


def _registered(connection: sqlalchemy.Connection) -> list[tuple[str, str]]:
    """Return the addresses that each version in the registry is loaded from."""
    version = SqlModelVersion
    columns = sqlalchemy.select(version.name, version.version, version.source, version.storage_location)
    rows = connection.execute(columns.where(version.current_stage != STAGE_DELETED_INTERNAL))
    return [(f"version {number} of {name}", uri) for name, number, *uris in rows for uri in uris if uri]


def _user(name: str, item: sqlalchemy.Row, registered: list[tuple[str, str]]) -> str | None:
    """Return the version in the registry that is loaded from this run or model."""
    own = (item.place, f"models:/{name}", f"runs:/{name}")
    return next((user for user, uri in registered if any(f"{uri}/".startswith(f"{each}/") for each in own)), None)


def _size(root: Path | None, place: str) -> int:
    """Return the bytes below a place in the server's artifact folder, 0 for one elsewhere."""
    if root is None or not place.startswith(PROXIED):
        return 0
    folder = root / place.removeprefix(PROXIED)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
