"""Programs that this machine runs: an end with their owner, ports, whether a server answers, what they print.

Nothing here loads MLflow or PyTorch, which take seconds: a server's start is waited for.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

from demo_lib.config import DemoError

import requests

# How to start this Python again: `make` does not activate the environment.
PYTHON = "python" if shutil.which("python") == sys.executable else sys.executable
GUARD = Path(__file__).with_name("guard.py")
# What MLflow's variables say of the artifacts' provider; what else they say is a program's own to decide.
PROVIDER = tuple(f"MLFLOW_{each}_" for each in ("S3", "BOTO", "GCS", "KERBEROS", "PYARROW", "ARTIFACT_UPLOAD"))
# What every `mlflow server` is told: no job runner, which is a dozen processes, no telemetry, no words about itself.
QUIET = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "PYTHONWARNINGS": "ignore:starlette.middleware.wsgi is deprecated",  # each of its processes says it
}
_pipes: weakref.WeakSet[IO[bytes]] = weakref.WeakSet()  # each to a guard
if hasattr(os, "register_at_fork"):  # a fork that held them open would be one more owner
    os.register_at_fork(after_in_child=lambda: [pipe.close() for pipe in _pipes])


class OwnedProcess(AbstractContextManager):
    """A command in the background, with its output in the file `log` (None: shown), that never outlives its owner.

    It ends with its process group at `stop()`, at the end of a `with` block, when no variable holds this any more, and
    when the process that started it ends, in whatever way. Asked to end, it has `patience` seconds to do so.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: IO[bytes] | int | None,
        environment: Mapping[str, str],
        folder: Path | None = None,
        patience: float = 15,
    ) -> None:
        self._guard = subprocess.Popen(
            [sys.executable, "-P", str(GUARD), str(patience), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,  # Ctrl-C in a terminal or an interrupted cell is the owner's to answer
        )
        _pipes.add(self._guard.stdin)
        self._stop = weakref.finalize(self, _let_go, self._guard)

    @property
    def exit_code(self) -> int | None:
        """The command's exit code, None while it runs."""
        return self._guard.poll()

    def stop(self) -> None:
        """End the command and wait until it is gone; a second call does nothing."""
        self._stop()

    def wait_for_health(self, url: str, seconds: float, ours: Callable = lambda: True) -> None:
        """Wait until the server that the command runs answers; as `wait_for_health`, but it is stopped on an error."""
        self.url = url
        guard = self._guard  # not self, which the exceptions of requests would keep alive
        try:
            wait_for_health(url, lambda: guard.poll() is None, seconds, ours)
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *error: object) -> None:
        self.stop()


def _let_go(guard: subprocess.Popen) -> None:
    with suppress(OSError):
        guard.stdin.close()
    guard.wait()


@dataclass(frozen=True)
class Finding:
    """What one check found: fine, or what to do."""

    name: str
    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FIX '}  {self.name:9}  {self.text}"


def examine_one(name: str, check: Callable[[], str]) -> Finding:
    """Run a check, which says what is fine or raises what to do; it never keeps others from running."""
    try:
        return Finding(name, True, check())
    except (DemoError, OSError, ImportError) as error:
        return Finding(name, False, str(error))
    except Exception as error:  # such as one of MLflow's
        return Finding(name, False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def examine_all(checks: Mapping[str, Callable[[], str]], seconds: float) -> list[Finding]:
    """Run the checks, all at once, and wait for so long at most: one that fails or hangs does not keep the others."""
    found = {name: Finding(name, False, f"no answer within {seconds:g} s: look why, and try again.") for name in checks}
    threads = [
        Thread(target=lambda name=name: found.update({name: examine_one(name, checks[name])}), daemon=True)
        for name in checks
    ]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    return list(dict(found).values())


def without_mlflow(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables without MLflow's, which could send a server's files elsewhere; its provider's stay."""
    ours = {name: name.upper().lstrip("_") for name in environment}  # it has private ones too
    kept = [name for name, each in ours.items() if not each.startswith("MLFLOW_") or each.startswith(PROVIDER)]
    return {name: environment[name] for name in kept}


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def refuse_port(host: str, port: int, todo: str) -> None:
    """Raise a `DemoError` that says what to do if this machine's port can't be listened on."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise DemoError(f"{host}:{port} can't be listened on ({error.strerror}): {todo}.") from None


def wait_for_health(url: str, runs: Callable[[], bool], seconds: float, ours: Callable = lambda: True) -> None:
    """Wait until the server answers, and `ours` says that it is not another one that does.

    If it ends, or does not answer in time, it is a DemoError whose text goes behind the server's name.
    """
    deadline = time.monotonic() + seconds
    while runs():
        with suppress(requests.RequestException):
            if ours() and requests.get(f"{url}/health", timeout=2).ok:
                return
        if time.monotonic() > deadline:
            raise DemoError(f"does not answer after {seconds:g} s")
        time.sleep(0.1)
    raise DemoError("ended before it answered")


@contextmanager
def live_output() -> Iterator[None]:
    """Print what child processes write, errors too, line by line as it comes, as a terminal does by itself.

    The block ends when the last child has closed its output.
    """
    if sys.stdout is sys.__stdout__:
        yield
        return
    end, start = os.pipe()
    before = {number: os.dup(number) for number in (1, 2)}  # children write to these numbers, not to sys.stdout
    for number in before:
        os.dup2(start, number)
    os.close(start)
    with os.fdopen(end, errors="replace") as lines:
        printer = Thread(target=sys.stdout.writelines, args=[lines])
        printer.start()
        try:
            yield
        finally:
            for number, kept in before.items():
                os.dup2(kept, number)
                os.close(kept)
            printer.join()
