"""Servers that this machine runs: their ports, whether they answer, and their end with the process that started them.

Nothing here loads MLflow or PyTorch, which take seconds: a server's start is waited for.
"""

from __future__ import annotations

import ctypes
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version

from demo_lib.config import DemoError

import psutil
import requests

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class ProcessError(DemoError):
    """A server that was started ended or does not answer; the text goes behind the server's name."""


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_user(port: int) -> str:
    """Say who listens on this machine's port: `mlflow`, `other` or `nobody`."""
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            return "nobody"
    try:
        answer = requests.get(f"http://127.0.0.1:{port}/version", timeout=2).text
    except requests.RequestException:
        return "other"
    return "mlflow" if answer == version("mlflow") else "other"


def wait_for_health(url: str, process: psutil.Popen, seconds: float, ours: Callable[[], bool] = lambda: True) -> None:
    """Wait until the server that the process runs answers, and `ours` says that it is not another one that does.

    Raises:
        ProcessError: it ended, or did not answer in time.
    """
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        with suppress(requests.RequestException):
            if ours() and requests.get(f"{url}/health", timeout=2).ok:
                return
        if time.monotonic() > deadline:
            raise ProcessError(f"does not answer after {seconds:g} s")
        time.sleep(0.1)
    raise ProcessError("ended before it answered")


def die_with_parent() -> None:
    """Have Linux end this process as soon as the one that started it is dead: SIGKILL leaves that one no time to.

    MLflow asks the same for the server below its command.
    """
    LIBC.prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
