"""Ask a server's parts one by one whether they work: MLflow's own /health looks at none of them."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from demo_lib.config import DemoError
from demo_lib.doctor import Finding

import requests

from server.client import call
from server.database import check_database, database_address
from server.process import is_supervised, read_state
from server.settings import Secrets, ServerSettings

SECONDS = 6  # for each request: all checks run at once, and a server that hangs is to be named within 15 s
NEEDED_GB = 1  # free space, below which a workshop's models may not fit
SEARCH = "/api/2.0/mlflow/experiments/search"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts"


def examine(settings: ServerSettings, secrets: Secrets) -> list[Finding]:
    """Run every check, all at once; one that fails or hangs does not keep the others from running."""
    checks = {"process": _process, "database": _database, "queries": _queries, "artifacts": _artifacts, "disk": _disk}
    if settings.accounts:
        checks["accounts"] = _accounts
    with ThreadPoolExecutor(len(checks)) as pool:
        return list(pool.map(lambda each: _examine_one(*each, settings, secrets), checks.items()))


def _examine_one(name: str, check: Callable[..., str], settings: ServerSettings, secrets: Secrets) -> Finding:
    try:
        return Finding(name, True, check(settings, secrets))
    except (DemoError, OSError) as error:
        return Finding(name, False, str(error))


def _process(settings: ServerSettings, secrets: Secrets) -> str:
    if (state := read_state(settings)) is None:
        raise DemoError(f"no server runs in {settings.folder}: start it with `python -m server start`.")
    if not is_supervised(state):
        raise DemoError("nothing watches over the server any more: end it with `python -m server stop`, and start it.")
    return f"runs at {settings.url}"


def _database(settings: ServerSettings, secrets: Secrets) -> str:
    if not check_database(database_address(settings, secrets), settings):
        raise DemoError("the database is gone or has no tables: restore a backup, or correct --folder.")
    return "answers, with the tables of this MLflow"


def _queries(settings: ServerSettings, secrets: Secrets) -> str:
    answer = call(settings, secrets, "POST", SEARCH, SECONDS, json={"max_results": 1})
    _expect(answer, 200, f"the server can't query its database: look into {settings.folder / 'server.log'}.")
    return f"an experiment search took {1000 * answer.elapsed.total_seconds():.0f} ms"


def _artifacts(settings: ServerSettings, secrets: Secrets) -> str:
    """Write, read and remove one artifact."""
    name, content = f"check-{uuid.uuid4().hex}.txt", b"written by `python -m server check`"
    fix = f"the artifacts in {settings.artifact_root} can't be used: correct its place or its permissions."
    path = f"{ARTIFACTS}/{name}"
    _expect(call(settings, secrets, "PUT", path, SECONDS, data=content), 200, fix)
    try:
        answer = call(settings, secrets, "GET", path, SECONDS)
        _expect(answer, 200, fix)
        if answer.content != content:
            raise DemoError(f"an artifact read back is not what was written: {fix}")
    finally:
        removed = call(settings, secrets, "DELETE", path, SECONDS)
    _expect(removed, 200, fix)
    return "written, read and removed"


def _disk(settings: ServerSettings, secrets: Secrets) -> str:
    """Look at the database's folder and that of the artifacts, which may be on another disk."""
    folders = [settings.folder] + ([] if "://" in settings.artifact_root else [Path(settings.artifact_root)])
    if missing := [folder for folder in folders if not folder.exists()]:
        raise DemoError(f"the folder {missing[0]} does not exist: start the server, or correct --folder.")
    free, folder = min((shutil.disk_usage(folder).free / 1e9, folder) for folder in folders)
    if free < NEEDED_GB:
        raise DemoError(f"{free:.1f} GB free in {folder}: free {NEEDED_GB} GB.")
    return f"{free:.1f} GB free in {folder}"


def _accounts(settings: ServerSettings, secrets: Secrets) -> str:
    answer = call(settings, None, "POST", SEARCH, SECONDS, json={"max_results": 1})
    _expect(answer, 401, "the server answers without a password: stop it, and look at its settings.")
    return "nobody gets in without a password"


def _expect(answer: requests.Response, status: int, fix: str) -> None:
    if answer.status_code in (401, 403) and status == 200:
        fix = "the administrator's password is not the one that the account has: set the right one."
    if answer.status_code != status:
        raise DemoError(f"{fix.rstrip('.')} (answer {answer.status_code}).")
