"""Back the server up, and restore it elsewhere."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from demo_lib.config import DemoError, sqlite_file, sqlite_uri, whole_file
from demo_lib.databases import connect

import mlflow
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from server.database import check_database, database, database_address, folders, postgres_tool
from server.settings import ServerSettings

MANIFEST = "manifest.json"
# What a database holds besides what PostgreSQL and its extensions made. A table's indexes and types come with it.
OWN = """
    SELECT nspname || '.' || name FROM (
        SELECT oid, relname AS name, relnamespace AS home FROM pg_class WHERE relkind NOT IN ('i', 'I', 't')
        UNION ALL SELECT oid, proname, pronamespace FROM pg_proc
        UNION ALL SELECT oid, typname, typnamespace FROM pg_type WHERE typtype IN ('d', 'e', 'r')
    ) AS things JOIN pg_namespace ON pg_namespace.oid = home
    WHERE nspname !~ '^(pg_|information_schema$)'
    AND NOT EXISTS (SELECT 1 FROM pg_depend WHERE objid = things.oid AND deptype = 'e') LIMIT 1
"""


def back_up(settings: ServerSettings, target: Path) -> dict[str, Any]:
    """Write the database, the artifacts and, last, a manifest of their hashes to a new folder; return the manifest.

    The database comes first: what it names was stored before, and is copied after. Artifacts on S3 are left out.

    Raises:
        DemoError: the target is not empty or can't be written, the database can't be read, or there is none.
    """
    root, address = settings.artifact_folder, database_address(settings)
    if any(target.resolve().is_relative_to(folder.resolve()) for folder in folders(settings)[1:]):
        raise DemoError(f"{target} is among the artifacts that are backed up: name a folder elsewhere.")
    if not check_database(address, settings):
        raise DemoError(f"the server in {settings.folder} has no tables yet: there is nothing to back up.")
    dialect = make_url(address).get_backend_name()
    with _filled(target):
        with suppress(PermissionError):  # of a disk that is another user's, or knows no modes
            target.chmod(0o700)  # password hashes, and what the models were trained on
        counts = _dump(address, target / f"database.{dialect}")
        if root:
            shutil.copytree(root, target / "artifacts", copy_function=_copy)
        manifest = {
            "mlflow": mlflow.__version__,
            "database": dialect,
            "artifacts": "artifacts" if root else settings.artifact_root,
            "counts": counts,
            "files": _hashes(target),
        }
        (target / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def restore(settings: ServerSettings, source: Path) -> dict[str, Any]:
    """Verify a backup, then fill the empty database and artifact folder from it, whole or not at all.

    Raises:
        DemoError: the backup is damaged or of another MLflow or database, or the database or the folder is not empty.
    """
    manifest, root = _verified(source), settings.artifact_folder
    copied = manifest["artifacts"] == "artifacts"
    if copied and root is None:
        raise DemoError(f"the backup has artifacts, and this server's are at {settings.artifact_root}: set a folder.")
    if (made := manifest["mlflow"]) != mlflow.__version__:
        raise DemoError(f"the backup is of MLflow {made}, this is {mlflow.__version__}: install that one.")
    if (ours := make_url(settings.address or "postgresql://").get_backend_name()) != manifest["database"]:
        raise DemoError(f"the backup is of a {manifest['database']} database, and this server's is {ours}.")
    with database(settings) as (address, _):
        if found := _content(address):
            raise DemoError(f"the server's database is not empty ({found}): restore into a new folder or database.")
        with _filled(root) if copied else nullcontext():
            if copied:
                _copy_private(source / "artifacts", root)
            _load(address, source / f"database.{manifest['database']}")  # last, as it is whole or not at all by itself
    return manifest


@contextmanager
def _filled(folder: Path) -> Iterator[None]:
    """Make the folder; if the block that fills it fails, remove what was made; a `DemoError` if it is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DemoError(f"{folder} is not empty: choose a new one.")
    there = folder.exists()  # it may be a disk's, or have an owner of its own
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for path in folder.iterdir() if there else [folder]:
            shutil.rmtree(path, ignore_errors=True)
            if path.is_file():
                path.unlink()
        if isinstance(error, OSError | SQLAlchemyError):
            reason = getattr(error, "orig", error)  # without the SQL
            raise DemoError(f"{folder} can't be filled ({reason}): nothing was kept.") from None
        raise


def _verified(source: Path) -> dict[str, Any]:
    """Read the manifest and compare every file with it."""
    try:
        read = json.loads((source / MANIFEST).read_text())
        manifest = {name: read[name] for name in ("mlflow", "database", "artifacts", "counts", "files")}
        expected, found = dict(manifest["files"]), _hashes(source)
    except (OSError, ValueError, KeyError, TypeError):
        raise DemoError(f"{source} is no backup: it has no readable {MANIFEST}.") from None
    for name in sorted(expected):
        if found.get(name) != expected[name]:
            raise DemoError(f"the backup {source} is damaged at {name}: use another one.")
    if more := sorted(found.keys() - expected.keys()):  # of a file manager, such as .DS_Store
        raise DemoError(f"the backup {source} has a file that is not its own, {more[0]}: delete that file.")
    return manifest


def _dump(address: str, file: Path) -> dict[str, int]:
    """Write the database as it is at one moment; return the number of runs and metric values at that moment."""
    if sqlite_file(address) is not None:
        with connect(address) as connection:
            connection.execute(text("VACUUM INTO :file"), {"file": str(file)})
        with connect(sqlite_uri(file)) as connection:
            return _counts(connection)
    with connect(address, isolation_level="REPEATABLE READ") as connection:
        snapshot = connection.scalar(text("SELECT pg_export_snapshot()"))
        options = ["--no-owner", "--no-privileges", "--encoding=UTF8", f"--snapshot={snapshot}", f"--file={file}"]
        _run_tool("pg_dump", options, address)
        return _counts(connection)


def _counts(connection: Connection) -> dict[str, int]:
    return {name: connection.scalar(text(f"SELECT count(*) FROM {name}")) for name in ("runs", "metrics")}


def _content(address: str) -> str | None:
    """Return the name of something that the database holds, None if it is empty."""
    if file := sqlite_file(address):
        return str(file) if file.exists() else None
    with connect(address) as connection:
        return connection.scalar(text(OWN))


def _load(address: str, file: Path) -> None:
    if (target := sqlite_file(address)) is not None:
        with whole_file(target, private=True) as partial:
            shutil.copyfile(file, partial)
        return
    # Unknown to PostgreSQL before version 17, which a dump by a newer pg_dump may well be for.
    script = file.read_text("utf-8").replace("SET transaction_timeout = 0;\n", "")
    _run_tool("psql", ["-X", "-q", "-v", "ON_ERROR_STOP=1", "--single-transaction", "-f", "-"], address, script)


def _run_tool(name: str, options: list[str], address: str, script: str | None = None) -> None:
    """Run a PostgreSQL client, which gets the password by the environment."""
    url = make_url(address)
    place = url._replace(drivername="postgresql", password=None).render_as_string()
    command = [postgres_tool(name), f"--dbname={place}", *options]
    variables = os.environ | {"PGPASSWORD": url.password or ""}
    run = partial(subprocess.run, input=script, capture_output=True, encoding="utf-8", env=variables)
    done = run(command)
    if "SSL support is not compiled in" in done.stderr and (other := shutil.which(name)):  # the wheel's have no TLS
        done = run([other, *command[1:]])
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
        todo = "; for TLS install PostgreSQL's own programs" if "SSL support" in reason else ""
        raise DemoError(f"{name} failed ({reason}): nothing was changed{todo}.")


def _copy(file: str, place: str) -> None:
    with suppress(FileNotFoundError):  # deleted meanwhile
        shutil.copyfile(file, place)


def _copy_private(source: Path, target: Path) -> None:
    """Copy what is in a folder, for its owner only, as the server writes it."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(mode=0o700)
        else:
            place.touch(mode=0o600)
            shutil.copyfile(path, place)


def _hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file but the manifest, by its path in the folder."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path != folder / MANIFEST:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            found[path.relative_to(folder).as_posix()] = digest
    return found
