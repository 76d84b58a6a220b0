"""The MLflow UI on the local store."""

from __future__ import annotations

import os
import subprocess
import sys

from demo_lib.config import DemoError, sqlite_file, tracking_uri
from demo_lib.ops.processes import port_user
from demo_lib.store import make_store


def serve_ui(port: int) -> int:
    """Serve the MLflow UI on the local store until Ctrl-C, and return the exit code.

    Raises:
        DemoError: the port is in use, or the runs are on a server that has its own UI.
    """
    uri = tracking_uri()
    if uri.startswith("http"):
        raise DemoError(f"the runs are on a server: open {uri} in a browser.")
    if (user := port_user(port)) != "nobody":
        what = "The MLflow UI already runs there" if user == "mlflow" else "Another program listens there"
        raise DemoError(f"port {port} is in use. {what}: open http://127.0.0.1:{port} or choose another --port.")
    options = []
    if (database := sqlite_file(uri)) is not None:
        make_store(database)
        options = ["--artifacts-destination", str(database.parent / "artifacts")]
    print(f"MLflow UI on http://127.0.0.1:{port}/#/experiments (stop it with Ctrl-C)", flush=True)
    # One worker and no job runner: two processes instead of a dozen.
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level=warning"]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return subprocess.call([*command, "--backend-store-uri", uri, *options], env=environment)
