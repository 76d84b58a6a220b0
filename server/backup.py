"""Back the server up, and restore it elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from demo_lib.config import DemoError, sqlite_file, sqlite_uri, whole_file

import mlflow
import sqlalchemy
from sqlalchemy import text
from sqlalchemy.engine import make_url

from server.database import check_database, connect, database, database_address, postgres_tool, schema_version
from server.process import read_state
from server.settings import ServerSettings

MANIFEST = "manifest.json"
FIELDS = {"schema": str, "mlflow": str, "database": str, "artifacts": str, "counts": dict, "files": dict}
DUMPS = {"sqlite": "database.sqlite", "postgresql": "database.sql"}


def back_up(settings: ServerSettings, target: Path) -> dict[str, Any]:
    """Write the database, the artifacts and a manifest of their hashes to a new folder; return the manifest.

    The server may run meanwhile. The database comes first: what it names was stored before, and is copied after.
    Artifacts outside of a folder, such as on S3, are left out.

    Raises:
        DemoError: the target is there already or can't be written, the database can't be read, or there is none.
    """
    root = settings.artifact_folder
    _refuse_places(settings, target)
    try:
        with _whole_folder(target) as partial:
            runs = read_state(settings) is not None
            with nullcontext((database_address(settings), None)) if runs else database(settings) as (address, _):
                if not check_database(address, settings):
                    raise DemoError(f"the server in {settings.folder} has no tables yet: there is nothing to back up.")
                dialect = make_url(address).get_backend_name()
                counts = _dump(address, partial / DUMPS[dialect])
            if root:
                _copy(root, partial / "artifacts")
            manifest = {
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "mlflow": mlflow.__version__,
                "schema": schema_version(),
                "database": dialect,
                "artifacts": "artifacts" if root else settings.artifact_root,
                "counts": counts,
                "files": _hashes(partial),
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for path in partial.rglob("*"):
                path.chmod(0o700 if path.is_dir() else 0o600)  # password hashes, and what the models were trained on
    except OSError as error:
        raise DemoError(f"the backup {target} can't be written ({error}): choose another folder.") from None
    return manifest


def restore(settings: ServerSettings, source: Path) -> dict[str, Any]:
    """Verify a backup, then fill the empty database and artifact folder from it, whole or not at all.

    Raises:
        DemoError: the backup is damaged or of another MLflow or database, a server runs in the folder, or the
            database or the artifact folder is not empty.
    """
    manifest = _verified(source)
    if read_state(settings) is not None:
        raise DemoError(f"a server runs in {settings.folder}: end it with `python -m server stop` first.")
    root = _empty_root(settings) if manifest["artifacts"] == "artifacts" else None
    with database(settings) as (address, _):
        _refuse_database(address, manifest)
        try:
            if root:
                with _whole_folder(root) as partial:
                    _copy(source / "artifacts", partial)
            _load(address, source / DUMPS[manifest["database"]])  # last, as it is whole or not at all by itself
        except BaseException as error:
            if root:
                shutil.rmtree(root, ignore_errors=True)
            if isinstance(error, OSError):
                raise DemoError(f"the backup can't be restored ({error}): nothing was kept.") from None
            raise
    return manifest


def _refuse_places(settings: ServerSettings, target: Path) -> None:
    root = settings.artifact_folder
    if not settings.folder.is_dir():
        raise DemoError(f"the folder {settings.folder} does not exist: name the server's with --folder.")
    if root and settings.artifacts and not root.is_dir():  # such as on a disk that is not mounted
        raise DemoError(f"the artifact folder {root} does not exist: make it, or correct --artifacts.")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DemoError(f"{target} is not empty: name a new folder.")
    if root and target.resolve().is_relative_to(root.resolve()):
        raise DemoError(f"{target} is among the artifacts that are backed up: name a folder elsewhere.")


def _empty_root(settings: ServerSettings) -> Path:
    if (root := settings.artifact_folder) is None:
        raise DemoError(f"the backup has artifacts, and this server's are at {settings.artifact_root}: set a folder.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DemoError(f"the artifact folder {root} is not empty: restore into a new one.")
    return root


def _refuse_database(address: str, manifest: dict[str, Any]) -> None:
    url = make_url(address)
    if (ours := url.get_backend_name()) != manifest["database"]:
        raise DemoError(f"the backup is of a {manifest['database']} database, and this server's is {ours}.")
    if manifest["schema"] != schema_version():
        made = manifest["mlflow"]
        raise DemoError(f"the backup is of MLflow {made}, this is {mlflow.__version__}: install that one.")
    if (file := sqlite_file(address)) and not file.exists():
        return  # connecting would make it
    with connect(address) as connection:
        if _counts(connection):
            shown = url.render_as_string(hide_password=True)
            raise DemoError(f"the database {shown} is not empty: restore into a new folder or database.")


def _verified(source: Path) -> dict[str, Any]:
    """Read the manifest and compare every file with it."""
    try:
        manifest = json.loads((source / MANIFEST).read_text())
        if not all(isinstance(manifest[name], kind) for name, kind in FIELDS.items()):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError):
        raise DemoError(f"{source} is no backup: it has no readable {MANIFEST}.") from None
    expected, found = manifest["files"], _hashes(source)
    for name in sorted(expected.keys() | found.keys()):
        if name not in expected:
            raise DemoError(f"the backup {source} has a file that is not of it, {name}: remove that.")
        if found.get(name) != expected[name]:
            raise DemoError(f"the backup {source} is damaged at {name}: use another one.")
    return manifest


def _dump(address: str, file: Path) -> dict[str, int]:
    """Write the database as it is at one moment; return the rows of each table at that moment."""
    if (source := sqlite_file(address)) is not None:
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(file)) as new:
            old.backup(new)
        with connect(sqlite_uri(file)) as connection:
            return _counts(connection)
    with connect(address, isolation_level="REPEATABLE READ") as connection:
        snapshot = connection.scalar(text("SELECT pg_export_snapshot()"))
        options = ["--no-owner", "--no-privileges", "--encoding=UTF8", f"--snapshot={snapshot}", f"--file={file}"]
        _run_tool("pg_dump", options, address)
        return _counts(connection)


def _load(address: str, file: Path) -> None:
    if (target := sqlite_file(address)) is not None:
        with whole_file(target) as partial:
            shutil.copyfile(file, partial)
        return
    # Unknown to PostgreSQL before version 17, which a dump by a newer pg_dump may well be for.
    script = file.read_text("utf-8").replace("SET transaction_timeout = 0;\n", "")
    _run_tool("psql", ["-X", "-q", "-v", "ON_ERROR_STOP=1", "--single-transaction", "-f", "-"], address, script)


def _run_tool(name: str, options: list[str], address: str, script: str | None = None) -> None:
    """Run a PostgreSQL client; the address goes by the environment, as it may have a password."""
    url = make_url(address)
    given = {"host": url.host, "port": url.port, "user": url.username, "password": url.password}
    given |= {"database": url.database} | dict(url.query)
    variables = os.environ | {f"PG{key.upper()}": str(value) for key, value in given.items() if value}
    command = [postgres_tool(name), *options]
    done = subprocess.run(command, input=script, capture_output=True, encoding="utf-8", env=variables)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise DemoError(f"{name} failed ({reason}): nothing was changed.")


def _counts(connection: sqlalchemy.Connection) -> dict[str, int]:
    """Return the number of rows of every table."""
    count = sqlalchemy.select(sqlalchemy.func.count())
    names = sorted(sqlalchemy.inspect(connection).get_table_names())
    return {name: connection.scalar(count.select_from(sqlalchemy.table(name))) for name in names}


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the target's place at the end: as `whole_file`, for its owner only."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True, mode=0o700)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    def copy(file: str, place: str) -> None:
        with suppress(FileNotFoundError):  # deleted meanwhile
            shutil.copyfile(file, place)

    target.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=copy, dirs_exist_ok=True)


def _hashes(folder: Path) -> dict[str, Any]:
    """Return size and hash of every file but the manifest, by its path in the folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    return found
