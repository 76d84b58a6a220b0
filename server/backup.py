"""Back the server up, and restore it elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from demo_lib.config import sqlite_file

import mlflow
import sqlalchemy
from mlflow.store.db.utils import _get_latest_schema_revision
from sqlalchemy.engine import make_url

from server.database import check_database, database, database_address, postgres_tool
from server.process import read_state
from server.settings import Secrets, ServerError, ServerSettings

MANIFEST = "manifest.json"
DUMPS = {"sqlite": "database.sqlite", "postgresql": "database.sql"}


def back_up(settings: ServerSettings, secrets: Secrets, target: Path) -> dict[str, Any]:
    """Write the database, the artifacts and a manifest of their hashes to a new folder; return the manifest.

    The server may run meanwhile. The database comes first: what it names was stored before, and is copied after.
    Artifacts outside of a folder, such as on S3, are left out.

    Raises:
        ServerError: the target is there already or can't be written, the database can't be read, or there is none.
    """
    if not settings.folder.is_dir():
        raise ServerError(f"the folder {settings.folder} does not exist: name the server's with --folder.")
    root = _artifacts_to_copy(settings)
    _refuse_place(target, root)
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)
        with _database_of(settings, secrets) as address:
            if not check_database(address, settings):
                raise ServerError(f"the server in {settings.folder} has no tables yet: there is nothing to back up.")
            dialect = make_url(address).get_backend_name()
            counts = _dump(address, partial / _dump_name(dialect))
        if root:
            _copy(root, partial / "artifacts")
        manifest = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "mlflow": mlflow.__version__,
            "schema": _get_latest_schema_revision(),
            "database": dialect,
            "artifacts": "artifacts" if root else settings.artifact_root,
            "counts": counts,
            "files": {name: _describe(partial / name) for name in _files(partial)},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in partial.rglob("*"):
            path.chmod(0o700 if path.is_dir() else 0o600)  # password hashes, and what the models were trained on
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as error:
        raise ServerError(f"the backup {target} can't be written ({error}): choose another folder.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def restore(settings: ServerSettings, secrets: Secrets, source: Path) -> dict[str, Any]:
    """Verify a backup, then fill the empty database and artifact folder from it, whole or not at all.

    Raises:
        ServerError: the backup is damaged or of another MLflow or database, a server runs in the folder, or the
            database or the artifact folder is not empty.
    """
    manifest = _verified(source)
    if read_state(settings) is not None:
        raise ServerError(f"a server runs in {settings.folder}: end it with `python -m server stop` first.")
    root = _empty_root(settings) if manifest["artifacts"] == "artifacts" else None
    partial = root.with_name(f".{root.name}.partial") if root else None
    with _database_of(settings, secrets) as address:
        _refuse_target(address, manifest)
        try:
            if root:
                shutil.rmtree(partial, ignore_errors=True)
                _copy(source / "artifacts", partial)
            _load(address, source / _dump_name(manifest["database"]))
            if (counts := _counts(address)) != manifest["counts"]:
                different = [name for name in counts if counts[name] != manifest["counts"].get(name)]
                raise ServerError(f"the restored database differs from the backup in {different}: nothing was kept.")
            if root:
                root.rmdir() if root.exists() else None
                partial.rename(root)
        except BaseException as error:
            _empty(address)
            if isinstance(error, OSError):
                raise ServerError(f"the backup can't be restored ({error}): nothing was kept.") from None
            raise
        finally:
            if partial:
                shutil.rmtree(partial, ignore_errors=True)
    return manifest


@contextmanager
def _database_of(settings: ServerSettings, secrets: Secrets) -> Iterator[str]:
    """Give the address of the server's database, which is started for the block if the server does not run."""
    if read_state(settings) is not None:
        yield database_address(settings, secrets)
        return
    with database(settings, secrets) as (address, _):
        yield address


def _dump_name(dialect: str) -> str:
    if dialect not in DUMPS:
        raise ServerError(f"a {dialect} database can't be backed up here: use its own tool.")
    return DUMPS[dialect]


def _dump(address: str, file: Path) -> dict[str, int]:
    """Write the database as it is at one moment; return the rows of each table at that moment."""
    if (source := sqlite_file(address)) is not None:
        with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(file)) as new:
            old.backup(new)
        return _counts(f"sqlite:///{file}")
    engine = sqlalchemy.create_engine(address, isolation_level="REPEATABLE READ")
    with engine.connect() as connection:
        snapshot = connection.scalar(sqlalchemy.text("SELECT pg_export_snapshot()"))
        options = ["--no-owner", "--no-privileges", "--encoding=UTF8", f"--snapshot={snapshot}", f"--file={file}"]
        _run_tool("pg_dump", options, address)
        counts = _count_in(connection)
    engine.dispose()
    return counts


def _load(address: str, file: Path) -> None:
    if (target := sqlite_file(address)) is not None:
        partial = target.with_name(f".{target.name}.partial")
        try:
            shutil.copyfile(file, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return
    # Unknown to PostgreSQL before version 17, which a dump by a newer pg_dump may well be for.
    script = file.read_text("utf-8").replace("SET transaction_timeout = 0;\n", "")
    _run_tool("psql", ["-X", "-q", "-v", "ON_ERROR_STOP=1", "--single-transaction", "-f", "-"], address, script)


def _run_tool(name: str, options: list[str], address: str, script: str | None = None) -> None:
    """Run a PostgreSQL client; the address goes by the environment, as it may have a password."""
    url = make_url(address)
    given = {"host": url.host, "port": url.port, "user": url.username, "password": url.password}
    given |= {"database": url.database} | dict(url.query)
    variables = {f"PG{key.upper()}": str(value) for key, value in given.items() if value}
    done = subprocess.run(
        [postgres_tool(name), *options], input=script, capture_output=True, encoding="utf-8", env=os.environ | variables
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        raise ServerError(f"{name} failed ({reason}): nothing was changed.")


def _counts(address: str) -> dict[str, int]:
    engine = sqlalchemy.create_engine(address)
    with engine.connect() as connection:
        found = _count_in(connection)
    engine.dispose()
    return found


def _count_in(connection: sqlalchemy.Connection) -> dict[str, int]:
    """Return the number of rows of every table."""
    names = sorted(sqlalchemy.inspect(connection).get_table_names())
    return {
        name: connection.scalar(sqlalchemy.select(sqlalchemy.func.count()).select_from(sqlalchemy.table(name)))
        for name in names
    }


def _empty(address: str) -> None:
    """Take back a restore that failed."""
    if (file := sqlite_file(address)) is not None:
        file.unlink(missing_ok=True)
        return
    engine = sqlalchemy.create_engine(address)
    with engine.begin() as connection:  # functions and triggers as well as tables
        connection.execute(sqlalchemy.text("DROP SCHEMA public CASCADE"))
        connection.execute(sqlalchemy.text("CREATE SCHEMA public"))
    engine.dispose()


def _refuse_target(address: str, manifest: dict[str, Any]) -> None:
    dialect = make_url(address).get_backend_name()
    if dialect != manifest["database"]:
        raise ServerError(f"the backup is of a {manifest['database']} database, and this server's is {dialect}.")
    if manifest["schema"] != _get_latest_schema_revision():
        raise ServerError(
            f"the backup is of MLflow {manifest['mlflow']}, this is {mlflow.__version__}: install that one."
        )
    file = sqlite_file(address)
    if file.stat().st_size if file and file.is_file() else (not file and _counts(address)):
        shown = make_url(address).render_as_string(hide_password=True)
        raise ServerError(f"the database {shown} is not empty: restore into a new folder or database.")


def _empty_root(settings: ServerSettings) -> Path:
    if "://" in settings.artifact_root:
        raise ServerError(f"the backup has artifacts, and this server's are at {settings.artifact_root}: set a folder.")
    root = Path(settings.artifact_root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ServerError(f"the artifact folder {root} is not empty: restore into a new one.")
    return root


def _verified(source: Path) -> dict[str, Any]:
    """Read the manifest and compare every file with it."""
    try:
        manifest = json.loads((source / MANIFEST).read_text())
        expected = {"schema": str, "mlflow": str, "database": str, "artifacts": str, "counts": dict, "files": dict}
        if not all(isinstance(manifest[name], kind) for name, kind in expected.items()):
            raise TypeError
        expected = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ServerError(f"{source} is no backup: it has no readable {MANIFEST}.") from None
    for name in sorted(expected.keys() | set(_files(source))):
        path = source / name
        if name not in expected:
            raise ServerError(f"the backup {source} has a file that is not of it, {name}: remove that.")
        if not path.is_file() or _describe(path) != expected[name]:
            raise ServerError(f"the backup {source} is damaged at {name}: use another one.")
    return manifest


def _refuse_place(target: Path, root: Path | None) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ServerError(f"{target} is not empty: name a new folder.")
    if root and target.resolve().is_relative_to(root.resolve()):
        raise ServerError(f"{target} is among the artifacts that are backed up: name a folder elsewhere.")


def _artifacts_to_copy(settings: ServerSettings) -> Path | None:
    """Return the folder of the artifacts, None for an address such as S3's."""
    if "://" in settings.artifact_root:
        return None
    root = Path(settings.artifact_root)
    if settings.artifacts and not root.is_dir():  # such as on a disk that is not mounted
        raise ServerError(f"the artifact folder {root} does not exist: make it, or correct --artifacts.")
    return root


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_copy_file, dirs_exist_ok=True)


def _copy_file(source: str, target: str) -> None:
    with suppress(FileNotFoundError):  # deleted meanwhile
        shutil.copyfile(source, target)


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path != folder / MANIFEST
    )


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
