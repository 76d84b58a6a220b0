"""Remove for good what was deleted long enough ago, with what hangs on it, and nothing else."""

import re
from typing import Any, NamedTuple

from demo_lib.config import DemoError

import requests
from mlflow.exceptions import MlflowException
from mlflow.utils.time import get_current_time_millis
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.exc import SQLAlchemyError

# MLflow's private parts. Plain `mlflow gc` leaves the children of deleted runs and the files of deleted experiments'
# models, refuses all if a run was deleted later than its experiment, and takes models that the registry needs.
from mlflow.entities.model_registry.model_version_stages import STAGE_DELETED_INTERNAL  # isort: skip
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository  # isort: skip
from mlflow.store.model_registry.dbmodels.models import SqlModelVersion  # isort: skip
from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlLoggedModel, SqlRun, SqlTag  # isort: skip
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # isort: skip

from server.client import as_admin, call
from server.database import database_address
from server.process import PROXIED, read_state
from server.settings import ServerSettings

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Cleanup(NamedTuple):
    """What goes, by id, and the sentences about what stays because the registry needs it."""

    runs: list[str]
    models: list[str]
    experiments: list[str]
    kept: list[str]


def clean_up(settings: ServerSettings, older_than: str, dry_run: bool = False) -> Cleanup:
    """Remove what was deleted longer ago than `older_than`, such as 30d, while the server runs, and return its ids."""
    if not re.fullmatch(r"[0-9]{1,9}[smhd]", older_than):
        raise DemoError(f"--older-than {older_than!r} is no time: write a number and s, m, h or d, such as 30d.")
    limit = get_current_time_millis() - int(older_than[:-1]) * UNITS[older_than[-1]] * 1000
    if read_state(settings) is None:
        raise DemoError(f"no server runs in {settings.folder}: start it, as it is what removes artifacts.")
    call(settings, "POST", "/api/2.0/mlflow/experiments/search", json={"max_results": 1})
    store = SqlAlchemyStore(database_address(settings), PROXIED)  # its default would make a folder here
    try:
        found = _find(store, limit)
        if not dry_run:
            with as_admin(settings):
                _remove(store, found)
    except (MlflowException, requests.RequestException, SQLAlchemyError) as error:
        reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        raise DemoError(f"not all could be removed ({reason}): fix that and run it again.") from None
    return found


def _find(store: SqlAlchemyStore, limit: int) -> Cleanup:
    """Find what was deleted before `limit`, in milliseconds, all in deleted experiments, and all below deleted runs."""
    old = select(SqlExperiment.experiment_id).where(_deleted(SqlExperiment, SqlExperiment.last_update_time, limit))
    dead = _deleted(SqlRun, SqlRun.deleted_time, limit) | SqlRun.experiment_id.in_(old)
    tree = select(SqlRun.run_uuid).where(dead).cte(recursive=True)
    below = (SqlTag.key == "mlflow.parentRunId") & (SqlTag.value == tree.c.run_uuid)
    tree = tree.union(select(SqlTag.run_uuid).where(below))  # and ends where the users' own tags go round in a circle
    dead = _deleted(SqlLoggedModel, SqlLoggedModel.last_updated_timestamp_ms, limit)
    dead |= SqlLoggedModel.experiment_id.in_(old)
    queries = (
        select(SqlRun.run_uuid, SqlRun.experiment_id).where(SqlRun.run_uuid.in_(select(tree))),
        select(SqlLoggedModel.model_id, SqlLoggedModel.experiment_id).where(dead),
        select(SqlModelVersion).where(SqlModelVersion.current_stage != STAGE_DELETED_INTERNAL),
    )
    with store.engine.connect() as connection:
        experiments = set(connection.scalars(old))
        runs, models, versions = (connection.execute(query).all() for query in queries)
    homes = dict([*runs, *models])
    loaded = {f"version {each.version} of {each.name}": f"{each.source} {each.storage_location}" for each in versions}
    needed = {each: user for user, places in loaded.items() for each in homes if each in places}
    stay = experiments & {homes[each] for each in needed}
    gone = [sorted(each for each, home in rows if each not in needed and home not in stay) for rows in (runs, models)]
    kept = [f"kept {each}: {user} is made of it; delete that version first." for each, user in needed.items()]
    return Cleanup(*gone, [str(each) for each in sorted(experiments - stay)], kept)


def _deleted(table: Any, time: Any, limit: int) -> ColumnElement:
    return (table.lifecycle_stage == "deleted") & (func.coalesce(time, 0) <= limit)  # early MLflow noted no time


def _remove(store: SqlAlchemyStore, found: Cleanup) -> None:
    """Remove artifacts before the rows that tell where they are, so that a second try finds what a first one left."""
    for run_id in found.runs:
        get_artifact_repository(store.get_run(run_id).info.artifact_uri).delete_artifacts()
        store.delete_run(run_id)  # with what the next call leaves: the assessments that it made
        store._hard_delete_run(run_id)
    for model_id in found.models:
        place = store.get_logged_model(model_id, allow_deleted=True).artifact_location
        get_artifact_repository(place).delete_artifacts()
        store._hard_delete_logged_model(model_id)
    for experiment_id in found.experiments:
        place = store.get_experiment(experiment_id).artifact_location
        if place == f"{PROXIED}{experiment_id}":  # another may be shared
            get_artifact_repository(place).delete_artifacts()  # SQLite gives its number to the next experiment
        store._hard_delete_experiment(experiment_id)
