"""Real servers for the tests: one of each profile, started once."""

import os
import secrets
import sys
from contextlib import contextmanager
from dataclasses import dataclass

from demo_lib.config import ROOT
from demo_lib.ops.processes import free_port

import mlflow
import pytest
from mlflow import MlflowClient
from pydantic import SecretStr

from server.client import as_admin
from server.database import database_address
from server.participants import add
from server.process import running, stop
from server.settings import PREFIX, ServerSettings
from tests.tools.load import Target
from tests.tools.processes import serving


@dataclass(frozen=True)
class Site:
    """A server that runs, with what its administrator knows."""

    settings: ServerSettings

    @property
    def url(self):
        return self.settings.url

    @property
    def admin(self):
        return self.settings.admin_name, self.settings.admin_password.get_secret_value()

    @property
    def target(self):
        """What a load needs to know."""
        admin = self.admin if self.settings.accounts else None
        return Target(self.url, database_address(self.settings), self.settings.artifact_root, admin)


@contextmanager
def started(settings):
    """Run `python -m server start` until the block ends, from when it answers; nothing of it is left then."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    texts = {name: v.get_secret_value() if isinstance(v, SecretStr) else str(v) for name, v in given.items()}
    variables = os.environ | {f"{PREFIX}{name.upper()}": text for name, text in texts.items()}
    command = [sys.executable, "-m", "server", "start"]
    try:
        with serving(command, f"{settings.url}/health", env=variables, cwd=ROOT) as process:
            yield process
    finally:
        stop(settings)


def make_secrets(**given):
    """Return new secrets of an administrator."""
    drawn = {name: SecretStr(secrets.token_urlsafe(16)) for name in ("admin_password", "secret_key")}
    return drawn | given


@contextmanager
def workshop_in(folder):
    """Run the profile `workshop`, with a PostgreSQL of its own, until the block ends."""
    settings = ServerSettings(profile="workshop", folder=folder, port=free_port(), **make_secrets())
    with running(settings):
        yield Site(settings)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """The profile `workshop`."""
    with workshop_in(tmp_path_factory.mktemp("workshop")) as site:
        yield site


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """The profile `local`."""
    settings = ServerSettings(folder=tmp_path_factory.mktemp("local"), port=free_port())
    with running(settings):
        yield Site(settings)


@pytest.fixture(scope="session")
def people(workshop):
    """The passwords of ann and bob, who are participants, by name; both can read the experiment `shared/example`."""
    with as_admin(workshop.settings):
        client = MlflowClient()
        client.create_run(client.create_experiment("shared/example"), run_name="example")
    passwords = {}
    add(workshop.settings, ["ann", "bob"], passwords.update)
    return passwords


@pytest.fixture
def login(workshop, monkeypatch):
    """Make this process, and those that it starts, a participant's: call it with name and password."""

    def enter(name, password):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", workshop.url)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        mlflow.set_tracking_uri(workshop.url)

    return enter
