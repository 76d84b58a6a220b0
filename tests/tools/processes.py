"""Processes and servers for the tests."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from demo_lib.config import sqlite_uri
from demo_lib.ops.processes import free_port

import psutil
import requests

PATIENCE = 300  # seconds until something counts as hanging: a busy machine takes many times what a quiet one does


def normal_signals() -> None:
    """Undo in a new process (`preexec_fn`) that a shell's background jobs ignore Ctrl-C, and those of nohup SIGHUP."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def scoring_servers(home: object) -> list[int]:
    """Return the ids of the scoring servers, and of the commands that start them, that have this `DEMO_HOME`."""
    return find_processes({"DEMO_HOME": str(home)}, "mlflow models serve", "scoring_server.app")


def team_servers(home: object) -> list[int]:
    """Return the ids of the tracking servers, and of the commands that start them, that have this `DEMO_HOME`."""
    # A test's own `mlflow server` has neither variable.
    ours = find_processes({"DEMO_HOME": str(home), "MLFLOW_DEMO_SERVER_FOLDER": None}, "-m server start")
    marks = {"DEMO_HOME": str(home), "MLFLOW_BACKEND_STORE_URI": None}
    return ours + find_processes(marks, "-m mlflow server", "mlflow.server")


def find_processes(marks: dict[str, str | None], *words: str) -> list[int]:
    """Return the ids of processes with one of the words in their command, and these variables; None is any value."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if any(each in command for each in words):
                given = process.environ()
                marked = all(name in given and value in (None, given[name]) for name, value in marks.items())
                found += [process.pid] if marked else []
        except psutil.Error:  # gone meanwhile, or not ours
            continue
    return found


def wait_until(true, seconds: float = PATIENCE) -> None:
    """Wait until `true()` is; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(0.1)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Run a real `mlflow server` on the store `mlflow.db` in the folder until the block ends, and give its address."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", sqlite_uri(folder / "mlflow.db")]
    command += ["--artifacts-destination", str(folder / "files")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with serving(command, f"http://127.0.0.1:{port}/health", env=environment):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def serving(command: list[str], address: str, seconds: float = PATIENCE, **options) -> Iterator[subprocess.Popen]:
    """Run a server until the block ends, from when its address answers."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet, **options)
    try:
        _wait_for(process, address, time.monotonic() + seconds)
        yield process
    finally:
        with suppress(ProcessLookupError):  # a test may have ended it
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE)


def _wait_for(process: subprocess.Popen, address: str, deadline: float) -> None:
    while True:
        try:
            return requests.get(address, timeout=2).raise_for_status()
        except requests.RequestException:
            assert process.poll() is None and time.monotonic() < deadline, f"{address} does not answer"
            time.sleep(0.2)
