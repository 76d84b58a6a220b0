"""A scoring server that a lesson or a script starts, and that is gone when they are; how long calls of a model take."""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from demo_lib.config import DemoError
from demo_lib.deploy.packaging import find_model
from demo_lib.ops.processes import OwnedProcess, free_port
from demo_lib.store import open_store

import numpy as np
import pandas as pd


class Server(OwnedProcess):
    """A scoring server that answers at `url`."""

    url: str


def serve(model_uri: str, seconds: float = 120) -> Server:
    """Run `mlflow models serve` on a free port of this machine, in this Python's environment, and wait for its answer.

    `model_uri` is a model's address such as `models:/fashion-classifier@champion`.

    Raises:
        DemoError: there is no model at that address, or the server ended, or did not answer within `seconds`.
    """
    store, port = open_store(), free_port()
    find_model(model_uri)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model_uri, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # MLflow starts `uvicorn` by that name, so it must be found also where the environment is not activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    # One thread a request, unless the caller says otherwise: the server shares the cores with whoever asks it.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"MLFLOW_TRACKING_URI": store, "PATH": path}
    with tempfile.TemporaryFile() as log:
        server = Server(command, log, environment)
        server.url = f"http://127.0.0.1:{port}"
        try:
            server.wait_for_health(server.url, seconds)
        except DemoError as error:
            log.seek(0)
            last = log.read().decode(errors="replace").rstrip().rpartition("\n")[2].strip() or "(empty)"
            raise DemoError(f"the scoring server of {model_uri} {error}; its log ends: {last[:500]}") from None
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
