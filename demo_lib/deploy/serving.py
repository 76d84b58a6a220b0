"""A scoring server that a lesson or a script starts, and that is gone when they are."""

import os
import sys
import sysconfig
import tempfile

from demo_lib.config import DemoError
from demo_lib.ops.processes import OwnedProcess, free_port
from demo_lib.store import open_store


def serve(model_uri: str, seconds: float = 120) -> OwnedProcess:
    """Run `mlflow models serve` on a free port, in this Python's environment, and return when it answers at its `url`.

    `model_uri` is a model's address such as `models:/fashion-classifier@champion`. If the server ends, as without a
    model at that address, or does not answer within `seconds`, it is a DemoError.
    """
    store, port = open_store(), free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model_uri, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # MLflow starts `uvicorn` by that name, so it must be found also where the environment is not activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    # One thread a request, unless the caller says otherwise: the server shares the cores with whoever asks it.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"MLFLOW_TRACKING_URI": store, "PATH": path}
    with tempfile.TemporaryFile() as log:
        server = OwnedProcess(command, log, environment)
        try:
            server.wait_for_health(f"http://127.0.0.1:{port}", seconds)
        except DemoError as error:
            log.seek(0)
            last = log.read().decode(errors="replace").strip().rpartition("\n")[2].strip() or "(empty)"
            raise DemoError(f"the scoring server of {model_uri} {error}; its log ends: {last[:500]}") from None
    return server
