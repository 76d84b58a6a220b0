"""Start, supervise and stop `mlflow server`: one command line, one environment, one process group."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

from demo_lib.config import DemoError, sqlite_file, whole_file
from demo_lib.databases import make_store
from demo_lib.identity import identity, lives
from demo_lib.ops.guard import await_end, end_group, group
from demo_lib.ops.processes import QUIET, refuse_port, wait_for_health, without_mlflow

import psutil

from server.database import (
    Say,
    another_users,
    database,
    forget_other_process,
    make_folders,
    own_postgres,
    quiet,
    stop_postgres,
)
from server.settings import PREFIX, ServerSettings
from server.studies import refuse_studies

HERE = ("127.0.0.1", "localhost")
START_SECONDS = 90  # for the first start on a slow machine, which makes the tables
PROXIED = "mlflow-artifacts:/"  # by which clients reach artifacts through the server
MARK = "DEMO_SERVER_MARK"  # variable by which the server's processes are known from others
CACHE_SECONDS = 60  # for which a worker remembers that a password was right: checking it takes most of a request
# Its default of 5 s ends workers that are only busy, and breaks off the answers that they were sending.
UVICORN = "--log-level=warning --timeout-worker-healthcheck=60"
LOG, STATE, AUTH = "server.log", "server.json", "auth.ini"  # in the server's folder
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def command(settings: ServerSettings) -> list[str]:
    """Return the arguments of `mlflow`; what is secret goes by the environment, which other users can't see."""
    here = list(dict.fromkeys([*(f"{name}:{settings.port}" for name in HERE), settings.url.removeprefix("http://")]))
    proxied = [name.strip() for name in settings.hosts.split(",") if name.strip()]
    hosts = [*HERE, *here, *proxied]  # exact ones: MLflow's default 10.* would also match 10.evil.example
    origins = [f"http://{each}" for each in here] + [f"https://{each}" for each in proxied]
    arguments = ["server", "--host", settings.host, "--port", str(settings.port)]
    arguments += ["--workers", str(settings.worker_count), "--artifacts-destination", settings.artifact_root]
    arguments += ["--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins)]
    arguments += ["--x-frame-options", settings.x_frame_options, "--uvicorn-opts", UVICORN]
    return [*arguments, "--app-name", "basic-auth"] if settings.accounts else arguments


def environment(settings: ServerSettings, address: str) -> dict[str, str]:
    """Return the variables that `mlflow server` needs besides those of this process that are not MLflow's."""
    chosen = QUIET | {
        "MLFLOW_BACKEND_STORE_URI": address,
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": str(settings.pool_size),
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": str(settings.max_overflow),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ASSISTANT_SANDBOX": "true",  # else its shell is the server's, for any client on loopback
    }
    if settings.accounts:
        chosen |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings.folder / AUTH),
            "MLFLOW_AUTH_ADMIN_USERNAME": settings.admin_name,
            "MLFLOW_AUTH_ADMIN_PASSWORD": settings.admin_password.get_secret_value(),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": settings.secret_key.get_secret_value(),
        }
    return chosen


def auth_config(address: str) -> str:
    """Return what MLflow is told about accounts; the address may have a password, so the file is its owner's only."""
    escaped = address.replace("%", "%%")  # MLflow reads the file with interpolation
    lines = ["default_permission = NO_PERMISSIONS", f"database_uri = {escaped}"]
    return "\n".join(["[mlflow]", *lines, f"auth_cache_ttl_seconds = {CACHE_SECONDS}", ""])


def refuse(settings: ServerSettings) -> None:
    """Raise a `DemoError` for what would make the server unsafe or useless, before anything is started."""
    if settings.accounts:
        for name in ("admin_password", "secret_key"):
            value = getattr(settings, name)
            # MLflow takes no shorter ones, and clients encode other letters differently, so nobody could log in.
            if value is None or not re.fullmatch(r"[!-~][ -~]{10,}[!-~]", value.get_secret_value()):
                what = "must be 12 or more ASCII letters, digits and signs"
                raise DemoError(f"{PREFIX}{name.upper()} {what}: set it in the environment or server/server.env.")
    elif settings.host not in HERE:
        raise DemoError(f"host {settings.host} lets others in without accounts: use --profile workshop or 127.0.0.1.")
    if read_state(settings) is not None:
        raise DemoError(f"a server already runs in {settings.folder}: use it, or end it with `python -m server stop`.")
    refuse_studies(settings)
    refuse_port(settings.host, settings.port, "choose another --port or --host")
    if settings.studies and own_postgres(settings) is None:
        refuse_port(settings.host, settings.studies_port, "choose another --studies-port or --host")
    make_folders(settings)


@contextmanager
def running(settings: ServerSettings, say: Say = quiet) -> Iterator["Server"]:
    """Run the server until the block ends, from when it answers; a `DemoError` if it is refused or does not answer."""
    refuse(settings)
    with database(settings, say) as (address, start_postgres):
        server = Server(settings, address, start_postgres)
        try:
            say("starting MLflow (its first start makes the tables) ...")
            if (file := sqlite_file(address)) and not file.exists():
                make_store(file, PROXIED)  # by itself MLflow leaves half of it where it is cut off
                file.chmod(0o600)
            server.start()
            server.wait()
            yield server
        finally:
            if server.process is not None:
                end_group(server.process.pid)
                server.process.poll()  # or it stays a zombie of this process
            (settings.folder / STATE).unlink(missing_ok=True)


class Server:
    """A `mlflow server` and what it needs to be started again."""

    def __init__(self, settings: ServerSettings, address: str, start_postgres: Callable[[], None] | None) -> None:
        self.settings, self.address, self.start_postgres = settings, address, start_postgres
        self.process: psutil.Popen | None = None

    def start(self) -> None:
        """Start the processes in a group of their own, with their output in the folder's `server.log`."""
        folder = self.settings.folder
        if self.settings.accounts:
            with whole_file(folder / AUTH, private=True) as file:
                file.write_text(auth_config(self.address), encoding="utf-8")
        scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # MLflow calls `uvicorn`
        variables = without_mlflow(os.environ) | environment(self.settings, self.address) | {"PATH": scripts}
        variables[MARK] = mark = uuid.uuid4().hex
        (folder / LOG).touch(mode=0o600)
        with (folder / LOG).open("ab") as log:
            arguments = [sys.executable, "-m", "mlflow", *command(self.settings)]
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            options = {"env": variables, "cwd": folder, "start_new_session": True, "umask": 0o077}  # its owner's only
            self.process, self.began = psutil.Popen(arguments, **options, **streams), monotonic()
        state = {
            "supervisor": identity(os.getpid()),
            "server": self.process.pid,
            "mark": mark,
            "folder": _number(folder),
        }
        with whole_file(folder / STATE, private=True) as file:
            file.write_text(json.dumps(state))

    def wait(self) -> None:
        """Wait until the server answers; a `DemoError` if it ends or does not answer in time."""
        try:
            wait_for_health(self.settings.url, lambda: self.process.poll() is None, START_SECONDS)
        except DemoError as error:
            raise DemoError(f"the server {error}: look into {self.settings.folder / LOG}.") from None

    def supervise(self) -> None:
        """Start again what dies, PostgreSQL or the server, until an exception such as Ctrl-C ends it.

        What dies within a minute, again and again, is started after longer and longer pauses, of 30 s at most.
        """
        pause = 0.5
        while True:
            with suppress(psutil.TimeoutExpired):
                self.process.wait(1)
            if self.start_postgres is not None and own_postgres(self.settings) is None:
                show("PostgreSQL ended: starting it again.")
                try:
                    forget_other_process(self.settings)
                    self.start_postgres()
                except Exception as error:  # such as old processes of it that still hold its memory
                    show(f"PostgreSQL does not start yet ({type(error).__name__}): trying again.")
            if self.process.poll() is not None:
                pause = 1 if monotonic() - self.began > 60 else min(2 * pause, 30)
                how = f"({self.process.returncode}; log: {self.settings.folder / LOG})"
                show(f"the server ended {how}: starting it again in {pause:g} s.")
                end_group(self.process.pid)  # its workers outlive it, and hold the port
                sleep(pause)
                self.start()


def show(text: str) -> None:
    """Print it at once, if anybody is there to read it: a server outlives its terminal."""
    with suppress(OSError):
        print(text, flush=True)


def ends_interrupt() -> None:
    """Make Ctrl-C, SIGTERM and a terminal that closes the same exception, so that what is open is closed."""

    def interrupt(signum: int, frame: object) -> None:
        for each in ENDS:  # a second Ctrl-C would leave half of it running
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for signum in ENDS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup makes it
            signal.signal(signum, interrupt)


def start(settings: ServerSettings) -> None:
    """Run the server in the foreground until an interrupt, and start again what dies."""
    with suppress(KeyboardInterrupt), running(settings, show) as server:
        show(f"MLflow {settings.profile} server on {settings.url} (stop it with Ctrl-C or `python -m server stop`)")
        show(f"log: {settings.folder / LOG}")
        server.supervise()


def stop(settings: ServerSettings) -> bool:
    """End the folder's server with all its processes, and return whether there was one."""
    if (state := read_state(settings)) is not None:
        if state["supervised"]:
            with suppress(psutil.NoSuchProcess):
                (supervisor := psutil.Process(int(state["supervisor"].split(":")[-2]))).terminate()
                await_end([supervisor], 30)
        if _left(state):
            end_group(state["server"])
        (settings.folder / STATE).unlink(missing_ok=True)
    return stop_postgres(settings) or state is not None  # its own, where the supervisor was killed


def read_state(settings: ServerSettings) -> dict | None:
    """Return what is known of the folder's server if any process of it is alive, and whether it is `supervised`."""
    try:
        state = json.loads((settings.folder / STATE).read_text())
        if state["folder"] != _number(settings.folder):  # it was copied with the folder
            return None
        state["supervised"] = lives(state["supervisor"]) is True
        return state if state["supervised"] or _left(state) else None
    except PermissionError:
        raise another_users(settings) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or one that another version wrote
        return None


def _number(folder: Path) -> str:
    """Return what stays a folder's own when it is renamed."""
    found = folder.stat()
    return f"{found.st_dev}:{found.st_ino}"


def _left(state: dict) -> bool:
    """Whether any process of the server lives, also workers that outlived the first one, whose number may be reused."""
    for process in group(state["server"]):
        with suppress(psutil.Error):
            if process.environ().get(MARK) == state["mark"]:
                return True
    return False
