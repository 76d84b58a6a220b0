"""Processes and servers for the tests."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import requests


def normal_interrupt() -> None:
    """Undo in a new process (`preexec_fn`) that a shell makes its background jobs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scoring_servers(home: object) -> list[int]:
    """Return the ids of the scoring servers, and of the commands that start them, that have this `DEMO_HOME`."""
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
            if "mlflow models serve" in command or "scoring_server.app" in command:
                found += [process.pid] if process.environ().get("DEMO_HOME") == str(home) else []
        except psutil.Error:  # gone meanwhile, or not ours
            continue
    return found


def wait_until(true, seconds: float = 60) -> None:
    """Wait until `true()` is; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not true after {seconds} s"
        time.sleep(0.1)


@contextmanager
def serving(command: list[str], address: str, seconds: float = 90, **options) -> Iterator[subprocess.Popen]:
    """Run a server until the block ends, from when its address answers."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet, **options)
    try:
        _wait_for(process, address, time.monotonic() + seconds)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def _wait_for(process: subprocess.Popen, address: str, deadline: float) -> None:
    while True:
        try:
            return requests.get(address, timeout=2).raise_for_status()
        except requests.RequestException:
            assert process.poll() is None and time.monotonic() < deadline, f"{address} does not answer"
            time.sleep(0.2)
