"""A Dask cluster that runs: its workers are told commands of this project, each of which is one task."""

import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING

from demo_lib.config import DemoError, sqlite_file
from demo_lib.ops.processes import OwnedProcess

if TYPE_CHECKING:
    from distributed import Client, Future

LOGIN = [f"MLFLOW_TRACKING_{each}" for each in ("USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS")]
CHOICES = [f"MLFLOW_{each}" for each in ("RUN_ID", "EXPERIMENT_ID", "EXPERIMENT_NAME")]  # of whoever started a worker
LOST = "the Dask scheduler has lost the tasks, or the connection to it is gone"


@contextmanager
def cluster(address: str | None) -> Iterator["Client | None"]:
    """Give a client of the scheduler at the address, None without an address.

    A scheduler that does not answer, and Dask not being installed, are a DemoError.
    """
    if not address:
        yield None
        return
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise DemoError("Dask is not installed: `pip install -e '.[dask]'` in this project's environment.") from None
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError, TypeError, RuntimeError) as error:  # the last two are of TLS
        reason = str(error).partition("\n")[0]
        raise DemoError(f"no Dask scheduler answers at {address} ({reason}): start it, or correct --dask.") from None
    with client:
        if not client.scheduler_info()["workers"]:
            print(f"the Dask scheduler at {address} has no workers yet: the tasks wait for them.", flush=True)
        yield client


def submit(client: "Client", arguments: Sequence[str], environment: Mapping[str, str]) -> "Future":
    """Hand a command to the cluster, which gets these variables and this environment's login to the server."""
    login = {name: os.environ[name] for name in LOGIN if name in os.environ}

    def run(*given: object) -> str:  # sent as code: a worker that can't import what it is sent ends without a word
        return import_module("demo_lib.ops.cluster").run_elsewhere(*given)

    return client.submit(run, [*arguments], {**environment, **login}, socket.gethostname(), pure=False)


def answer(task: "Future") -> str:
    """Return why a task that is done failed, or an empty text."""
    if task.cancelled():
        return LOST
    error = task.exception()
    if isinstance(error, ModuleNotFoundError):
        return f"a worker of the cluster lacks this project ({error}): install it there."
    return f"{error}" or type(error).__name__ if error else task.result()


def run_elsewhere(arguments: list[str], environment: dict[str, str], host: str) -> str:
    """Run a command of this project, on a cluster's machine, and return what it said last if it failed.

    The files that its variables name are on the machine `host`; on another one they are a DemoError.
    """
    here = socket.gethostname()
    if here != host and any(sqlite_file(each) for each in environment.values()):
        todo = "give --storage a PostgreSQL, and MLFLOW_TRACKING_URI a server"
        raise DemoError(f"{here} can't open a file of {host}: {todo}.")
    given = {name: value for name, value in os.environ.items() if name not in CHOICES}
    # A task has one of its Dask worker's threads; with a nanny, Dask says so itself.
    given |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or "1"} | environment
    with tempfile.TemporaryFile() as said:
        with OwnedProcess([sys.executable, "-m", "demo_lib", *arguments], said, given) as command:
            while command.exit_code is None:
                time.sleep(0.3)
        said.seek(0)
        last = said.read().decode(errors="replace").strip().rpartition("\n")[2].removeprefix("error: ")
    return f"{here}: {last or f'exit code {command.exit_code}'}" if command.exit_code else ""
