"""Databases of MLflow and Optuna: whether one answers, whose tables are in it, and what SQLite needs besides."""

import errno
import os
import re
import sqlite3
import tempfile
from contextlib import closing, nullcontext, suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from demo_lib.config import DemoError, sqlite_file, sqlite_uri, whole_file, without_login

import sqlalchemy
from alembic.runtime.migration import MigrationContext
from filelock import FileLock
from sqlalchemy.engine import make_url

SECONDS = 4  # until a database counts as not there; MLflow's and the drivers' own retries take minutes
WRITING = 30  # seconds for which others that write to a SQLite file are waited for
# By table, the column that holds where artifacts are.
LOCATIONS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
    "trace_tags": "value",
}


def connect(address: str, **options: object) -> sqlalchemy.Connection:
    """Connect to a database; at the end of a `with` block nothing of it stays open."""
    lite = make_url(address).get_backend_name() == "sqlite"
    patience = {"timeout": WRITING} if lite else {"connect_timeout": SECONDS}
    return sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool, connect_args=patience, **options).connect()


def open_database(uri: str) -> None:
    """Make sure that MLflow can use the database; one of an unknown kind, or that can't be used, is a DemoError."""
    if (file := sqlite_file(uri)) is not None:
        make_store(file)
    elif re.match(r"(postgresql|mysql|mssql)(\+\w+)?://", uri):
        has_mlflow(uri)
    else:
        what = "set it to a server's http address, to sqlite:/// and the path of a file, or to a database's address"
        raise DemoError(f"MLFLOW_TRACKING_URI = {without_login(uri)!r} is no store: {what}, or unset it.")


def make_store(database: Path, artifacts: str = "") -> None:
    """Make the SQLite store if it is not there, whole or not at all, with its files at `artifacts` or beside it.

    A place that can't be written, or is a folder, is a DemoError.
    """
    root = artifacts or (database.parent / "artifacts").as_uri()
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        if database.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_new(database):
            tempfile.TemporaryFile(dir=database.parent).close()  # where nothing can be written, a lock waits for ever
        # One process makes the tables while others wait: they would break each other's.
        lock = FileLock(database.with_name(f".{database.name}.lock"), timeout=60)
        with lock if _is_new(database) else nullcontext():
            if _is_new(database):
                with whole_file(database) as partial:
                    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # private; takes a second

                    # MLflow's only public way to make the tables is to start a whole server.
                    SqlAlchemyStore(sqlite_uri(partial), root)._dispose_engine()
        has_mlflow(sqlite_uri(database))
        _speed_up_sorting(database)
        _follow(database)
    except (OSError, sqlite3.DatabaseError) as error:
        what = "set DEMO_HOME or MLFLOW_TRACKING_URI to a place that can be written, and where no other file lies"
        raise DemoError(f"the store {database} can't be used ({error}): {what}.") from None


def _is_new(database: Path) -> bool:
    return not database.exists() or (database.is_file() and not database.stat().st_size)


def refuse_reader(database: Path) -> None:
    """Raise a DemoError if you may read the SQLite store, or its artifacts, but not write there."""
    places = [database, database.parent, database.parent / "artifacts"]  # SQLite writes beside the file
    if closed := [each for each in places if each.exists() and not os.access(each, os.W_OK)]:
        todo = "make it yours (with `chown`, where it was made by sudo), or set DEMO_HOME to a folder of your own"
        raise DemoError(f"you may not write to {closed[0]}: {todo}.")


def has_mlflow(address: str) -> bool:
    """Return whether the database has MLflow's tables; one that has others, or can't be reached, is a DemoError."""
    names, revision = _tables(address)
    if names and "experiments" not in names:
        what = f"the database {without_login(address)} is not MLflow's (it has a table {min(names)})"
        raise DemoError(f"{what}: give MLflow one of its own.")
    if names and revision != (expected := _newest_version()):
        why = f"the database {without_login(address)} has the tables of another MLflow"
        todo = "copy it, then run `mlflow db upgrade` with its address, or use the MLflow that made it"
        raise DemoError(f"{why} (version {revision}, this one needs {expected}): {todo}.")
    return bool(names)


@cache
def _newest_version() -> str:
    """Return the version of this MLflow's tables, asked once: it is read from all migrations."""
    from mlflow.store.db.utils import _get_latest_schema_revision  # private; takes seconds

    return _get_latest_schema_revision()


def refuse_mlflow(address: str) -> None:
    """Raise a DemoError if the database, in whatever spelling of its address, is one of MLflow's."""
    if "experiments" in _tables(address)[0]:
        raise DemoError(f"{without_login(address)} is MLflow's database: give Optuna one of its own.")


def _tables(address: str) -> tuple[set[str], str | None]:
    """Return the names of the tables, and the version that their maker noted."""
    try:
        if (file := sqlite_file(address)) and not file.exists():
            return set(), None
        with connect(address) as connection:
            names = set(sqlalchemy.inspect(connection).get_table_names())
            return names, MigrationContext.configure(connection).get_current_revision()
    except Exception as error:  # of SQLAlchemy, or of the driver, which may be missing
        reason = without_login(str(getattr(error, "orig", error)).strip().partition("\n")[0])
        todo = "move the file away if it is broken" if sqlite_file(address) else "start it"
        what = f"the database {without_login(address)} can't be used ({reason})"
        raise DemoError(f"{what}: {todo}, or correct its address.") from None


def _speed_up_sorting(database: Path) -> None:
    """Tell SQLite's planner that `latest_metrics` is large: else sorting runs by a metric takes quadratic time."""
    with suppress(sqlite3.OperationalError), closing(sqlite3.connect(database, timeout=5)) as connection, connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'sqlite_stat1'").fetchone():
            connection.execute("ANALYZE alembic_version")  # makes the table of statistics
            rows = "40000 400 1"  # in all, of a metric, of a metric of a run
            index = ("latest_metrics", "sqlite_autoindex_latest_metrics_1", rows)
            connection.execute("INSERT INTO sqlite_stat1 VALUES (?, ?, ?)", index)


def _follow(database: Path) -> None:
    """Correct the absolute paths by which MLflow knows its artifacts, if the store was moved or copied with them."""
    here = database.parent / "artifacts"
    with closing(sqlite3.connect(database, timeout=WRITING)) as connection, connection:
        query = "SELECT artifact_location FROM experiments ORDER BY experiment_id LIMIT 1"  # the one that MLflow made
        (place,) = connection.execute(query).fetchone() or [""]
        before = place.rpartition("/")[0]
        there = Path(url2pathname(urlsplit(before).path))
        if before == here.as_uri() or not before.startswith("file:") or there.name != here.name:
            return
        if there.exists() and (not here.exists() or there.samefile(here)):
            return
        for table, column in LOCATIONS.items():
            moved = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
            connection.execute(moved, (f"{here.as_uri()}/", len(before) + 2, len(before) + 1, f"{before}/"))
