"""A real Chromium, JupyterLab on a copy of the lessons, and the MLflow UI on the test's store."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from demo_lib.batch import LESSONS
from demo_lib.processes import free_port

import pytest

from tests.browser.chromium import chromium
from tests.tools.processes import mlflow_server, serving


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium; without it these tests are skipped, except in CI, where they fail."""
    with chromium() as browser:
        if browser is None:
            (pytest.fail if os.environ.get("CI") else pytest.skip)("no Chromium here: install the package chromium")
        yield browser


@dataclass(frozen=True)
class Lab:
    """The addresses of a JupyterLab and of the `mlflow server` that it tracks to, and its `DEMO_HOME`."""

    url: str
    tracking: str
    home: Path


@pytest.fixture(scope="module")
def lab(template, tmp_path_factory):
    """One for all lessons, as in a workshop, on a copy of them: it saves them with outputs."""
    home, port = tmp_path_factory.mktemp("lab"), free_port()
    shutil.copytree(LESSONS, home / "notebooks")
    (home / "data").symlink_to(template / "data")
    (home / "server").mkdir()
    shutil.copy(template / "store" / "mlflow.db", home / "server" / "mlflow.db")
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={home / 'notebooks'}", "--IdentityProvider.token="]
    command += ["--LabApp.expose_app_in_browser=True"]
    environment = {"JUPYTER_CONFIG_DIR": str(home / "jupyter"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    with mlflow_server(home / "server") as tracking:
        environment |= {"MLFLOW_TRACKING_URI": tracking, "DEMO_HOME": str(home)}
        with serving(command, f"http://127.0.0.1:{port}/lab", env=os.environ | environment):
            yield Lab(f"http://127.0.0.1:{port}/lab", tracking, home)


@pytest.fixture
def ui(home, monkeypatch):
    """The address of `python -m demo_lib ui` on the test's store."""
    port = free_port()
    monkeypatch.setenv("DEMO_UI_PORT", str(port))
    with serving([sys.executable, "-m", "demo_lib", "ui"], f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}"
