"""Remove for good what was deleted long enough ago, with what hangs on it, and nothing else."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import requests
import sqlalchemy
from mlflow.cli import _gc_tracking_resources
from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion
from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlLoggedModel, SqlRun, SqlTag
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.time import get_current_time_millis

from server.client import as_admin, call
from server.database import database_address
from server.process import read_state
from server.settings import Secrets, ServerError, ServerSettings

PROXIED = "mlflow-artifacts:/"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Item:
    """A run, model or experiment: where its artifacts are, when it was deleted, and its experiment."""

    place: str
    deleted: int | None
    experiment: int


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


def clean_up(settings: ServerSettings, secrets: Secrets, older_than: str, dry_run: bool = False) -> Cleanup:
    """Remove what was deleted longer ago than `older_than`, such as 30d, and return what that was.

    Plain `mlflow gc` fails here or takes too much: it leaves the children of deleted runs behind, refuses all if a
    run was deleted later than its experiment, leaves the models' files of deleted experiments, and takes models that
    the registry needs; when it is given run ids, it takes every deleted experiment, however new.
    The server must run: it is what removes artifacts.

    Raises:
        ServerError: no server answers, or it refuses the administrator, or `older_than` is no time.
    """
    age = _milliseconds(older_than)
    if read_state(settings) is None:
        raise ServerError(f"no server runs in {settings.folder}: start it, as it is what removes artifacts.")
    answer = call(settings, secrets, "POST", "/api/2.0/mlflow/experiments/search", json={"max_results": 1})
    if answer.status_code != 200:
        raise ServerError(f"the server refuses the administrator (answer {answer.status_code}): correct the password.")
    store = SqlAlchemyStore(database_address(settings, secrets), PROXIED)  # its default would make a folder here
    try:
        found = _find(store.engine, settings, get_current_time_millis() - age)
        if not dry_run:
            with as_admin(settings, secrets):
                _remove(store, found)
    except (MlflowException, requests.RequestException, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        raise ServerError(f"not all could be removed ({reason}): fix that and run it again.") from None
    finally:
        store._dispose_engine()
    return found


def _find(engine: sqlalchemy.Engine, settings: ServerSettings, limit: int) -> Cleanup:
    """Find what was deleted before `limit`, with everything in deleted experiments and below deleted runs."""
    with engine.connect() as connection:
        experiments, runs, models = (_items(connection, table) for table in (SqlExperiment, SqlRun, SqlLoggedModel))
        tags = sqlalchemy.select(SqlTag.run_uuid, SqlTag.value).where(SqlTag.key == MLFLOW_PARENT_RUN_ID)
        parents = dict(connection.execute(tags).all())
        registered = _registered(connection)
    old = _due(experiments, limit)
    doomed_runs = _due(runs, limit) | {each for each, run in runs.items() if run.experiment in old}
    doomed_runs |= _below(doomed_runs, parents) & runs.keys()
    doomed_models = _due(models, limit) | {each for each, model in models.items() if model.experiment in old}
    items = {each: runs[each] for each in doomed_runs} | {each: models[each] for each in doomed_models}
    needed = {each: user for each, item in items.items() if (user := _user(each, item, registered))}
    stay = old & {items[each].experiment for each in needed}
    kept = [f"kept {each}: {user} is made of it; delete that version first." for each, user in needed.items()]
    kept += [f"kept experiment {each}, which has what is kept." for each in stay]
    going = {each: item for each, item in items.items() if each not in needed and item.experiment not in stay}
    places = [item.place for item in going.values() if item.experiment not in old]
    return Cleanup(
        sorted(doomed_runs & going.keys()),
        sorted(doomed_models & going.keys()),
        [str(each) for each in sorted(old - stay)],
        kept,
        sum(_size(settings, place) for place in places + [experiments[each].place for each in old - stay]),
    )


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
        _gc_tracking_resources(
            backend_store=store,
            run_ids=list(found.runs),
            experiment_ids=found.experiments,
            logged_model_ids=found.models,
            older_than=None,
            time_delta=0,
            skip_experiments=not found.experiments,
            skip_logged_models=not found.models,
        )


def _items(connection: sqlalchemy.Connection, table: type) -> dict[int | str, Item]:
    names = {
        SqlExperiment: ("experiment_id", "artifact_location", "last_update_time"),
        SqlRun: ("run_uuid", "artifact_uri", "deleted_time"),
        SqlLoggedModel: ("model_id", "artifact_location", "last_updated_timestamp_ms"),
    }[table]
    name, place, time = (getattr(table, each) for each in names)
    deleted = sqlalchemy.case((table.lifecycle_stage == "deleted", sqlalchemy.func.coalesce(time, 0)))
    rows = connection.execute(sqlalchemy.select(name, place, deleted, table.experiment_id))
    return {each: Item(*values) for each, *values in rows}


def _due(items: dict[int | str, Item], limit: int) -> set[int | str]:
    return {each for each, item in items.items() if item.deleted is not None and item.deleted <= limit}


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
    rows = connection.execute(
        sqlalchemy.select(version.name, version.version, version.source, version.storage_location).where(
            version.current_stage != STAGE_DELETED_INTERNAL
        )
    )
    return [(f"version {number} of {name}", uri) for name, number, *uris in rows for uri in uris if uri]


def _user(name: str, item: Item, registered: list[tuple[str, str]]) -> str | None:
    """Return the version in the registry that is loaded from this run or model."""
    for user, uri in registered:
        own = (item.place, f"models:/{name}", f"runs:/{name}")
        if any(uri == each or uri.startswith(f"{each}/") for each in own):
            return user
    return None


def _size(settings: ServerSettings, place: str) -> int:
    """Return the bytes below a place in the server's artifact folder, 0 for one elsewhere."""
    if "://" in settings.artifact_root or not place.startswith(PROXIED):
        return 0
    folder = Path(settings.artifact_root, place.removeprefix(PROXIED))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _milliseconds(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}[smhd]", text):
        raise ServerError(f"--older-than {text!r} is no time: write a number and s, m, h or d, such as 30d.")
    return int(text[:-1]) * UNITS[text[-1]] * 1000
