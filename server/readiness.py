"""Ask a server's parts one by one whether they work: MLflow's own /health looks at none of them."""

import shutil
import uuid
from functools import partial
from typing import Any

from demo_lib.config import DemoError, without_login
from demo_lib.databases import connect
from demo_lib.ops.processes import Finding, examine_all

import requests

from server.client import call
from server.database import check_database, database_address, folders
from server.process import LOG, read_state
from server.settings import ServerSettings
from server.studies import refuse_studies, studies_address

SECONDS = 6  # for each request: all checks run at once, and a server that hangs is to be named within 15 s
SEARCH, ARTIFACTS = "/api/2.0/mlflow/experiments/search", "/api/2.0/mlflow-artifacts/artifacts"
NEEDED_GB = 1  # free space, below which a workshop's models may not fit


def examine(settings: ServerSettings) -> list[Finding]:
    """Run every check, all at once; one that fails or hangs does not keep the others from running."""
    checks = {"process": _process, "database": _database, "queries": _queries, "artifacts": _artifacts, "disk": _disk}
    if settings.accounts:
        checks["accounts"] = _accounts
    if settings.studies:
        checks["studies"] = _studies
    return examine_all({name: partial(check, settings) for name, check in checks.items()}, 2 * SECONDS)


def _process(settings: ServerSettings) -> str:
    if (state := read_state(settings)) is None:
        raise DemoError(f"no server runs in {settings.folder}: start it with `python -m server start`.")
    if not state["supervised"]:
        raise DemoError("nothing watches over the server any more: end it with `python -m server stop`, and start it.")
    return f"runs at {settings.url}"


def _database(settings: ServerSettings) -> str:
    if not check_database(database_address(settings), settings):
        raise DemoError("the database is gone or has no tables: restore a backup, or correct --folder.")
    return "answers, with the tables of this MLflow"


def _queries(settings: ServerSettings) -> str:
    fix = f"the server can't query its database: look into {settings.folder / LOG}"
    answer = _ask(settings, 200, fix, "POST", SEARCH, json={"max_results": 1})
    return f"an experiment search took {1000 * answer.elapsed.total_seconds():.0f} ms"


def _artifacts(settings: ServerSettings) -> str:
    folders(settings)  # the server would make a folder that is gone anew, and hide that it is
    path, content = f"{ARTIFACTS}/check-{uuid.uuid4().hex}.txt", b"written by `python -m server check`"
    fix = f"the artifacts in {settings.artifact_root} can't be used: correct its place or its permissions"
    _ask(settings, 200, fix, "PUT", path, data=content)
    try:
        if _ask(settings, 200, fix, "GET", path).content != content:
            raise DemoError(f"an artifact read back is not what was written: {fix}.")
    finally:
        _ask(settings, 200, fix, "DELETE", path)
    return "written, read and removed"


def _disk(settings: ServerSettings) -> str:
    """Look at the database's folder and that of the artifacts, which may be on another disk."""
    free, folder = min((shutil.disk_usage(folder).free / 1e9, folder) for folder in folders(settings))
    if free < NEEDED_GB:
        raise DemoError(f"{free:.1f} GB free in {folder}: free {NEEDED_GB} GB.")
    return f"{free:.1f} GB free in {folder}"


def _accounts(settings: ServerSettings) -> str:
    fix = "the server answers without a password: stop it, and look at its settings"
    _ask(settings, 401, fix, "POST", SEARCH, json={"max_results": 1}, nobody=True)
    return "nobody gets in without a password"


def _studies(settings: ServerSettings) -> str:
    refuse_studies(settings)
    address = studies_address(settings)
    try:
        with connect(address):
            return f"{without_login(address)} answers, for `tune --storage`"
    except Exception as error:
        what = f"Optuna's database {without_login(address)} does not let workers in"
        raise DemoError(f"{what} ({without_login(str(error)).partition(chr(10))[0]}): start again.") from None


def _ask(settings: ServerSettings, status: int, fix: str, method: str, path: str, **options: Any) -> requests.Response:
    answer = call(settings, method, path, timeout=SECONDS, **options)
    if answer.status_code != status:
        raise DemoError(f"{fix} (answer {answer.status_code}).")
    return answer
