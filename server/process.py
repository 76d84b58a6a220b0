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
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from demo_lib.config import DemoError, whole_file
from demo_lib.ops.guard import alive, await_end, end_group, group
from demo_lib.ops.processes import port_user, wait_for_health

import psutil

from server.database import database, make_folder, own_postgres, stop_postgres
from server.settings import HERE, PREFIX, ServerSettings

START_SECONDS = 90  # for the first start on a slow machine, which makes the tables
SHORTEST_PASSWORD = 12  # MLflow's own limit, for every account
CACHE_SECONDS = 60  # for which a worker remembers that a password was right: checking it takes most of a request
# Its default of 5 s ends workers that are only busy, and breaks off the answers that they were sending.
UVICORN = "--log-level=warning --timeout-worker-healthcheck=60"
LOOPBACK = (*HERE, "::1")
LOG, STATE, AUTH = "server.log", "server.json", "auth.ini"  # in the server's folder
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def command(settings: ServerSettings) -> list[str]:
    """Return the arguments of `mlflow`; what is secret goes by the environment, which other users can't see."""
    arguments = ["server", "--host", settings.host, "--port", str(settings.port)]
    arguments += ["--workers", str(settings.worker_count), "--artifacts-destination", settings.artifact_root]
    arguments += ["--allowed-hosts", settings.allowed_hosts, "--cors-allowed-origins", settings.allowed_origins]
    arguments += ["--x-frame-options", settings.x_frame_options, "--uvicorn-opts", UVICORN]
    return [*arguments, "--app-name", "basic-auth"] if settings.accounts else arguments


def environment(settings: ServerSettings, address: str) -> dict[str, str]:
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
        _refuse_accounts(settings)
    elif settings.host not in LOOPBACK:
        why = f"host {settings.host} lets other machines in, and the profile local has no accounts"
        raise DemoError(f"{why}: use --profile workshop, or keep 127.0.0.1.")
    if (running := read_state(settings)) is not None:
        raise DemoError(f"the server already runs at {running['url']}: use it, or end it with `python -m server stop`.")
    _refuse_port(settings)
    make_folder(settings)
    if settings.artifact_folder:
        _refuse_artifacts(settings)
    elif not settings.artifacts.startswith("s3://"):
        raise DemoError(f"artifacts can't be at {settings.artifacts}: name a folder or an s3:// address.")


def _refuse_accounts(settings: ServerSettings) -> None:
    for name in ("admin_password", "secret_key"):
        value, variable = getattr(settings, name), f"{PREFIX}{name.upper()}"
        if value is None:
            raise DemoError(f"{variable} is not set: put one of your own into the environment or server/server.env.")
        if len(text := value.get_secret_value()) < SHORTEST_PASSWORD:
            raise DemoError(f"{variable} is too short: it needs {SHORTEST_PASSWORD} characters or more.")
        # Clients encode other letters differently, so nobody could log in.
        if not (text.isascii() and text.isprintable() and text == text.strip()):
            raise DemoError(f"{variable} may have only ASCII letters, digits and signs, and no space at its ends.")
    if not re.fullmatch(r"[\w.@-]+", settings.admin_name, re.ASCII):
        raise DemoError(f"the admin name {settings.admin_name!r} is not allowed: use letters, digits and . @ - _")


def _refuse_port(settings: ServerSettings) -> None:
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: past connections are fine
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            used = port_user(settings.port) if settings.host in LOOPBACK else "other"
            who = {"mlflow": "an MLflow server listens there", "other": "another program listens there"}.get(used)
            why = f"{settings.host}:{settings.port} can't be listened on ({who or error.strerror})"
            raise DemoError(f"{why}: choose another --port or --host.") from None


def _refuse_artifacts(settings: ServerSettings) -> None:
    """A folder that was named must be there: mistyped, or on a disk that is not mounted, it would fill another disk."""
    root = settings.artifact_folder
    try:
        if not settings.artifacts:
            root.mkdir(parents=True, exist_ok=True)
        if not root.is_dir():
            raise DemoError(f"the artifact folder {root} does not exist: make it, or correct --artifacts.")
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        why = f"the artifact folder {root} can't be written ({error.strerror})"
        raise DemoError(f"{why}: change its owner, or choose another.") from None


@contextmanager
def running(settings: ServerSettings) -> Iterator[Server]:
    """Run the server until the block ends, from when it answers; a `DemoError` if it is refused or does not answer."""
    refuse(settings)
    with database(settings) as (address, postgres):
        server = Server(settings, address, postgres)
        try:
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

    def __init__(self, settings: ServerSettings, address: str, postgres: object) -> None:
        self.settings, self.address, self.postgres = settings, address, postgres
        self.process: psutil.Popen | None = None

    def start(self) -> None:
        """Start the processes in a group of their own, with their output in the folder's `server.log`."""
        folder = self.settings.folder
        if self.settings.accounts:
            with whole_file(folder / AUTH, private=True) as file:
                file.write_text(auth_config(self.address), encoding="utf-8")
        scripts = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])  # MLflow calls `uvicorn`
        variables = os.environ | environment(self.settings, self.address) | {"PATH": scripts}
        variables.pop("MLFLOW_TRACKING_URI", None)
        (folder / LOG).touch(mode=0o600)
        with (folder / LOG).open("ab") as log:
            arguments = [sys.executable, "-m", "mlflow", *command(self.settings)]
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            self.process = psutil.Popen(arguments, env=variables, cwd=folder, start_new_session=True, **streams)
        # With its start, which tells a process from a later one of its id.
        known = {"supervisor": psutil.Process(), "server": self.process}
        state = {name: (each.pid, each.create_time()) for name, each in known.items()}
        with whole_file(folder / STATE, private=True) as file:
            file.write_text(json.dumps({"url": self.settings.url} | state))

    def wait(self) -> None:
        """Wait until the server answers, or say with the log's last line, without secrets, why it does not."""
        try:
            wait_for_health(self.settings.url, lambda: self.process.poll() is None, START_SECONDS)
        except DemoError as error:
            log = self.settings.folder / LOG
            text = log.read_text(errors="replace").strip() or "its log is empty"
            for secret in self.settings.hidden:
                text = text.replace(secret, "***")
            said = f"{text.splitlines()[-1].strip()[:500]} (all of it: {log})"
            raise DemoError(f"the server {error}: {said}") from None

    def supervise(self) -> None:
        """Start again what dies, PostgreSQL or the server, until an exception such as Ctrl-C ends it."""
        while True:
            with suppress(psutil.TimeoutExpired):
                self.process.wait(1)
            if self.postgres is not None and own_postgres(self.settings) is None:
                print("PostgreSQL ended: starting it again.", flush=True)
                try:
                    self.postgres.ensure_postgres_running()
                except Exception as error:  # such as old processes of it that still hold its memory
                    print(f"PostgreSQL does not start yet ({type(error).__name__}): trying again.", flush=True)
            if self.process.poll() is not None:
                print(f"the server ended ({self.process.returncode}): starting it again.", flush=True)
                end_group(self.process.pid)  # its workers outlive it, and hold the port
                self.start()


def start(settings: ServerSettings) -> None:
    """Run the server in the foreground until Ctrl-C, SIGTERM or its terminal closes, and start again what dies."""

    def interrupt(signum: int, frame: object) -> None:
        for each in ENDS:  # a second Ctrl-C would leave half of it running
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for signum in ENDS:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup makes it
            signal.signal(signum, interrupt)
    with suppress(KeyboardInterrupt), running(settings) as server:
        print(f"MLflow {settings.profile} server on {settings.url} (stop it with Ctrl-C or `python -m server stop`)")
        print(f"log: {settings.folder / LOG}", flush=True)
        server.supervise()


def stop(settings: ServerSettings) -> bool:
    """End the folder's server with all its processes, and return whether there was one."""
    if (state := read_state(settings)) is not None:
        if (supervisor := _find(*state["supervisor"])) is not None and supervisor.pid != os.getpid():
            supervisor.terminate()
            await_end([supervisor], 30)
        if _left(*state["server"]):
            end_group(state["server"][0])
        (settings.folder / STATE).unlink(missing_ok=True)
    return stop_postgres(settings) or state is not None  # its own, where the supervisor was killed


def read_state(settings: ServerSettings) -> dict | None:
    """Return what is known of the folder's server if any process of it is alive, and whether it is `supervised`."""
    try:
        state = json.loads((settings.folder / STATE).read_text())
    except (OSError, ValueError):
        return None
    state["supervised"] = _find(*state["supervisor"]) is not None
    return state if state["supervised"] or _left(*state["server"]) else None


def _left(pid: int, created: float) -> list[psutil.Process]:
    """Return what lives of the server: its first process, and the workers, which outlive that."""
    return [each for each in group(pid) if each.create_time() >= created - 1]


def _find(pid: int, created: float) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < 2 and alive(process):
            return process
    return None
