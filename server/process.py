"""Start, supervise and stop `mlflow server`: one command line, one environment, one process group."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path

from demo_lib.processes import ProcessError, port_user, wait_for_health

import psutil

from server.database import database, make_folder, own_postgres, stop_postgres
from server.settings import LOOPBACK, PREFIX, SHORTEST_PASSWORD, Secrets, ServerError, ServerSettings

START_SECONDS = 90  # for the first start on a slow machine, which makes the tables
# Its default of 5 s ends workers that are only busy, and breaks off the answers that they were sending.
UVICORN = "--log-level=warning --timeout-worker-healthcheck=60"
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
CACHE_SECONDS = 60  # for which a worker remembers that a password was right: checking it takes most of a request


def command(settings: ServerSettings) -> list[str]:
    """Return the arguments of `mlflow`; what is secret goes by the environment, which other users can't see."""
    arguments = ["server", "--host", settings.host, "--port", str(settings.port)]
    arguments += ["--workers", str(settings.worker_count), "--artifacts-destination", settings.artifact_root]
    arguments += ["--allowed-hosts", ",".join(settings.allowed_hosts)]
    arguments += ["--cors-allowed-origins", ",".join(settings.allowed_origins)]
    arguments += ["--x-frame-options", settings.x_frame_options, "--uvicorn-opts", UVICORN]
    return [*arguments, "--app-name", "basic-auth"] if settings.accounts else arguments


def environment(settings: ServerSettings, secrets: Secrets, address: str) -> dict[str, str]:
    """Return the variables that `mlflow server` needs besides those of this process."""
    chosen = {
        "MLFLOW_BACKEND_STORE_URI": address,
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": str(settings.pool_size),
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": str(settings.max_overflow),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ASSISTANT_SANDBOX": "true",  # else its shell is the server's, for any client on loopback
    }
    if settings.accounts:
        chosen |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(auth_file(settings)),
            "MLFLOW_AUTH_ADMIN_USERNAME": settings.admin_name,
            "MLFLOW_AUTH_ADMIN_PASSWORD": secrets.admin_password.get_secret_value(),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.secret_key.get_secret_value(),
        }
    return chosen


def auth_file(settings: ServerSettings) -> Path:
    """Return the path of the file that tells MLflow about accounts."""
    return settings.folder / "auth.ini"


def auth_config(address: str) -> str:
    """Return what MLflow is told about accounts; the address may have a password, so the file is its owner's only."""
    config = ConfigParser(interpolation=None)
    config["mlflow"] = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": address.replace("%", "%%"),  # MLflow reads the file with interpolation
        "auth_cache_ttl_seconds": str(CACHE_SECONDS),
    }
    text = StringIO()
    config.write(text)
    return text.getvalue()


def refuse(settings: ServerSettings, secrets: Secrets) -> None:
    """Look for what would make the server unsafe or useless, before anything is started.

    Raises:
        ServerError: a secret is missing or short, accounts are missing for others than this machine, the port is in
            use, a server runs in the folder, or the artifact folder can't be written.
    """
    if settings.host not in LOOPBACK and not settings.accounts:
        raise ServerError(
            f"host {settings.host} lets other machines in, and the profile local has no accounts: use "
            "--profile workshop, or keep 127.0.0.1."
        )
    if settings.accounts:
        _refuse_secrets(secrets)
        if not re.fullmatch(r"[\w.@-]+", settings.admin_name, re.ASCII):
            raise ServerError(f"the admin name {settings.admin_name!r} is not allowed: use letters, digits and . @ - _")
    if (running := read_state(settings)) is not None:
        raise ServerError(
            f"the server already runs at {running['url']}: use it, or end it with `python -m server stop`."
        )
    _refuse_port(settings)
    make_folder(settings)
    if "://" not in settings.artifact_root:
        _refuse_folder(settings)
    elif not settings.artifact_root.startswith("s3://"):
        raise ServerError(f"artifacts can't be at {settings.artifact_root}: name a folder or an s3:// address.")


def _refuse_secrets(secrets: Secrets) -> None:
    for name in ("admin_password", "secret_key"):
        value = getattr(secrets, name)
        variable = f"{PREFIX}{name.upper()}"
        if value is None:
            raise ServerError(f"{variable} is not set: put one of your own into the environment or server/server.env.")
        text = value.get_secret_value()
        if len(text) < SHORTEST_PASSWORD:
            raise ServerError(f"{variable} is too short: it needs {SHORTEST_PASSWORD} characters or more.")
        # Clients encode other letters differently, so nobody could log in.
        if not (text.isascii() and text.isprintable() and text == text.strip()):
            raise ServerError(f"{variable} may have only ASCII letters, digits and signs, and no space at its ends.")


def _refuse_port(settings: ServerSettings) -> None:
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: past connections are fine
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            used = port_user(settings.port) if settings.host in LOOPBACK else "other"
            who = {"mlflow": "an MLflow server listens there", "other": "another program listens there"}.get(used)
            raise ServerError(
                f"{settings.host}:{settings.port} can't be listened on ({who or error.strerror}): choose another "
                "--port or --host."
            ) from None


def _refuse_folder(settings: ServerSettings) -> None:
    """A folder that was named must be there: mistyped, or on a disk that is not mounted, it would fill another disk."""
    root = Path(settings.artifact_root)
    if not settings.artifacts:
        with suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
    if not root.is_dir():
        raise ServerError(f"the artifact folder {root} does not exist: make it, or correct --artifacts.")
    probe = root / f".write-test-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ServerError(
            f"the artifact folder {root} can't be written ({error.strerror}): change its owner, or choose another."
        ) from None


@contextmanager
def running(settings: ServerSettings, secrets: Secrets, seconds: float = START_SECONDS) -> Iterator[Server]:
    """Run the server until the block ends, from when it answers; nothing of it is left then.

    Raises:
        ServerError: as `refuse`, or the server ended or did not answer in time.
    """
    refuse(settings, secrets)
    with database(settings, secrets) as (address, postgres):
        server = Server(settings, secrets, address, postgres)
        try:
            server.start()
            server.wait(seconds)
            yield server
        finally:
            server.stop()


class Server:
    """A `mlflow server` and what it needs to be started again."""

    def __init__(self, settings: ServerSettings, secrets: Secrets, address: str, postgres: object) -> None:
        self.settings, self.secrets, self.address, self.postgres = settings, secrets, address, postgres
        self.process: psutil.Popen | None = None

    @property
    def url(self) -> str:
        """The server's address on this machine."""
        return self.settings.url

    def start(self) -> None:
        """Start the processes in a group of their own, with their output in the folder's `server.log`."""
        folder = self.settings.folder
        if self.settings.accounts:
            write_private(auth_file(self.settings), auth_config(self.address))
        scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # MLflow calls `uvicorn`
        variables = os.environ | environment(self.settings, self.secrets, self.address) | {"PATH": scripts}
        variables.pop("MLFLOW_TRACKING_URI", None)
        with open(folder / "server.log", "ab", opener=_private) as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "mlflow", *command(self.settings)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                cwd=folder,
                start_new_session=True,
            )
        state = {"url": self.url, "supervisor": _identity(psutil.Process()), "server": _identity(self.process)}
        write_private(_state_file(self.settings), json.dumps(state))

    def wait(self, seconds: float) -> None:
        """Wait until the server answers."""
        try:
            wait_for_health(self.url, self.process, seconds)
        except ProcessError as error:
            raise ServerError(f"the server {error}: {self.log_tail()}") from None

    def supervise(self) -> None:
        """Start again what dies, PostgreSQL or the server, until an exception such as Ctrl-C ends it."""
        while True:
            with suppress(psutil.TimeoutExpired):
                self.process.wait(1)
            if self.postgres is not None and own_postgres(self.settings) is None:
                self._start_postgres()
            if self.process.poll() is not None:
                print(f"the server ended ({self.process.returncode}): starting it again.", flush=True)
                end_group(self.process.pid)  # its workers outlive it, and hold the port
                self.start()

    def _start_postgres(self) -> None:
        print("PostgreSQL ended: starting it again.", flush=True)
        try:
            self.postgres.ensure_postgres_running()
        except Exception as error:  # such as old processes of it that still hold its memory
            print(f"PostgreSQL does not start yet ({type(error).__name__}): trying again.", flush=True)

    def stop(self) -> None:
        """End the whole group and wait until it is gone."""
        if self.process is not None:
            end_group(self.process.pid)
            self.process.poll()  # or it stays a zombie of this process
            _state_file(self.settings).unlink(missing_ok=True)

    def log_tail(self) -> str:
        """Return the log's last line that says something, without secrets."""
        text = (self.settings.folder / "server.log").read_text(errors="replace")
        for secret in self.secrets.hidden:
            text = text.replace(secret, "***")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"{lines[-1][:500] if lines else 'its log is empty'} (all of it: {self.settings.folder / 'server.log'})"


def start(settings: ServerSettings, secrets: Secrets) -> None:
    """Run the server in the foreground until Ctrl-C, SIGTERM or its terminal closes, and start again what dies."""
    for signum in ENDS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup makes it
            signal.signal(signum, _interrupt)
    with suppress(KeyboardInterrupt), running(settings, secrets) as server:
        print(f"MLflow {settings.profile} server on {server.url} (stop it with Ctrl-C or `python -m server stop`)")
        print(f"log: {settings.folder / 'server.log'}", flush=True)
        server.supervise()


def stop(settings: ServerSettings) -> bool:
    """End the folder's server with all its processes, and return whether there was one."""
    state = read_state(settings)
    if state is not None:
        _stop_processes(state)
        _state_file(settings).unlink(missing_ok=True)
    return stop_postgres(settings) or state is not None  # its own, where the supervisor was killed


def _stop_processes(state: dict) -> None:
    if (supervisor := _find(state["supervisor"])) is not None and supervisor.pid != os.getpid():
        supervisor.terminate()
        _await_end([supervisor], 30)
    if _orphans(state["server"]):
        end_group(state["server"][0])


def read_state(settings: ServerSettings) -> dict | None:
    """Return what is known of the folder's server if any process of it is alive."""
    try:
        state = json.loads(_state_file(settings).read_text())
    except (OSError, ValueError):
        return None
    alive = _find(state["supervisor"]) or _find(state["server"]) or _orphans(state["server"])
    return state if alive else None


def is_supervised(state: dict) -> bool:
    """Return whether what starts the server again is alive."""
    return _find(state["supervisor"]) is not None


def end_group(leader: int, seconds: float = 15) -> None:
    """End every process of the group, first by asking, and wait until they are gone."""
    for end in (psutil.Process.terminate, psutil.Process.kill):
        members = _group(leader)
        for member in members:
            with suppress(psutil.NoSuchProcess):
                end(member)
        _await_end(members, seconds)


def _await_end(processes: list[psutil.Process], seconds: float) -> None:
    """Wait until they are gone, for so long at most; those are that only their parent has not noticed yet."""
    deadline = time.monotonic() + seconds
    while any(map(_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _group(leader: int) -> list[psutil.Process]:
    """Return the living processes of the group; on Windows, which has no groups, the leader and its descendants."""
    if os.name != "posix":
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(leader)
            return [found, *found.children(recursive=True)]
        return []
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == leader and _alive(process):
                found.append(process)
    return found


def _orphans(identity: list) -> list[psutil.Process]:
    """Return the workers that outlived the server's first process."""
    return [each for each in _group(identity[0]) if each.create_time() >= identity[1] - 1]


def _identity(process: psutil.Process) -> list:
    """Return a process's id and start, which tells it from a later one of that id."""
    return [process.pid, process.create_time()]


def _find(identity: list) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(identity[0])
        if abs(process.create_time() - identity[1]) < 2 and _alive(process):
            return process
    return None


def _state_file(settings: ServerSettings) -> Path:
    return settings.folder / "server.json"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with open(partial, "w", encoding="utf-8", opener=_private) as file:
        file.write(text)
    partial.replace(path)


def _interrupt(signum: int, frame: object) -> None:
    """End the server once: a second Ctrl-C would leave half of it running."""
    for each in ENDS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
