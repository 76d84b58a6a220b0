"""A real Chromium, a participant's JupyterLab on a copy of the lessons, and the MLflow UI on the test's store."""

import sys
from dataclasses import dataclass
from pathlib import Path

from demo_lib.ops.processes import free_port

import mlflow
import pytest
from mlflow import MlflowClient

from server.client import as_admin
from server.participants import add
from tests.browser.chromium import chromium
from tests.browser.jupyterlab import jupyterlab
from tests.server.conftest import Site, workshop_in
from tests.tools.processes import serving


@pytest.fixture(scope="session")
def browser():
    """One Chromium for all tests."""
    with chromium() as browser:
        yield browser


@dataclass(frozen=True)
class Lab:
    """The address of lea's JupyterLab, its folder and variables, and the workshop's server that it tracks to."""

    url: str
    home: Path
    environment: dict[str, str]
    site: Site


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A workshop's server with the accounts of lea and finn, and their passwords."""
    passwords = {}
    with workshop_in(tmp_path_factory.mktemp("workshop")) as site:
        add(site.settings, ["lea", "finn"], passwords.update)
        with as_admin(site.settings):
            MlflowClient().create_registered_model("fashion-classifier")  # somebody else's, of the lessons' name
        yield site, passwords


@pytest.fixture(scope="module")
def lab(template, workshop, tmp_path_factory):
    """The JupyterLab of lea on a copy of the notebooks: it saves them with outputs."""
    home = tmp_path_factory.mktemp("lab")
    (home / "data").symlink_to(template / "data")
    site, passwords = workshop
    environment = {"DEMO_HOME": str(home), "MLFLOW_TRACKING_URI": site.url}
    environment |= {"MLFLOW_TRACKING_USERNAME": "lea", "MLFLOW_TRACKING_PASSWORD": passwords["lea"]}
    with jupyterlab(home, environment) as url:
        yield Lab(url, home, environment, site)


@pytest.fixture
def as_lea(lab, monkeypatch):
    """Make this process, and those that it starts, lea's."""
    for name, value in lab.environment.items():
        monkeypatch.setenv(name, value)
    mlflow.set_tracking_uri(lab.site.url)


@pytest.fixture
def ui(home, monkeypatch):
    """The address of `python -m demo_lib ui` on the test's store."""
    port = free_port()
    monkeypatch.setenv("DEMO_UI_PORT", str(port))
    with serving([sys.executable, "-m", "demo_lib", "ui"], f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}"
