"""A scoring server that a lesson or a script starts, and that is gone when they are; how long calls of a model take."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any, Self

from demo_lib.config import DemoError, tracking_uri
from demo_lib.packaging import find_model
from demo_lib.processes import LIBC, ProcessError, die_with_parent, free_port, wait_for_health
from demo_lib.tracking import open_store

import numpy as np
import pandas as pd
import psutil


class ServingError(DemoError):
    """The scoring server does not start."""


class Server:
    """A scoring server that answers at `url`, until `stop()`.

    It stops as well at the end of its `with` block, when no variable holds it any more, and when the process that
    started it ends; on Linux also when that process is killed outright.
    """

    def __init__(self, url: str, process: psutil.Popen) -> None:
        self.url = url
        self._stop = weakref.finalize(self, _stop, process)

    def stop(self) -> None:
        """End the server and wait until it is gone; a second call does nothing."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def serve(model_uri: str, seconds: float = 120) -> Server:
    """Run `mlflow models serve` on a free port of this machine, in this Python's environment, and wait for its answer.

    `model_uri` is a model's address such as `models:/fashion-classifier@champion`.

    Raises:
        PackageError: there is no model at that address.
        ServingError: the server ended, or did not answer within `seconds`.
    """
    open_store()
    find_model(model_uri)
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model_uri, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = psutil.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,  # an interrupted cell must not take the server with it
            preexec_fn=die_with_parent if LIBC else None,
        )
        server = Server(f"http://127.0.0.1:{port}", process)
        try:
            wait_for_health(server.url, process, seconds)
        except ProcessError as error:
            server.stop()
            raise ServingError(f"the scoring server of {model_uri} {error}; its log ends: {_tail(log)}") from None
        except BaseException:
            server.stop()
            raise
    return server


def time_calls(
    call: Callable[[np.ndarray], Any], images: np.ndarray, sizes: Sequence[int], seconds: float
) -> pd.DataFrame:
    """Call with batches of each size, for `seconds` and five times at least, after one call that is not counted.

    Returns one row a size: `images` in a call, the median `milliseconds` of a call, and `images_per_second`.
    """
    rows = []
    for size in sizes:
        call(images[:size])
        spent = []
        while len(spent) < 5 or sum(spent) < seconds:
            started = time.perf_counter()
            call(images[:size])
            spent.append(time.perf_counter() - started)
        rows.append((size, 1000 * float(np.median(spent)), size * len(spent) / sum(spent)))
    return pd.DataFrame(rows, columns=["images", "milliseconds", "images_per_second"])


def _environment() -> dict[str, str]:
    """Return the environment of the server, which looks the model up in the store by itself.

    MLflow starts `uvicorn` by that name, so it must be found where the environment is not activated. One thread a
    request, unless the caller says otherwise: the server shares the cores with whoever asks it.
    """
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    return {"OMP_NUM_THREADS": "1"} | os.environ | {"MLFLOW_TRACKING_URI": tracking_uri(), "PATH": path}


def _tail(log: IO[bytes]) -> str:
    """Return the last line of the log that is not empty."""
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip()[:500] for line in reversed(lines) if line.strip()), "(empty)")


def _stop(process: psutil.Popen) -> None:
    """End the server and then the command that started it, which is there to see the server off."""
    below = []
    with suppress(psutil.NoSuchProcess):
        below = process.children(recursive=True)
    for members in (below, [process]):
        for end in (psutil.Process.terminate, psutil.Process.kill):
            for member in members:
                with suppress(psutil.NoSuchProcess):
                    end(member)
            _, members = psutil.wait_procs(members, timeout=5)
