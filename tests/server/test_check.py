"""`check` names the part that fails, also where MLflow's /health says that all is well."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from demo_lib.ops.processes import free_port

import pytest
import requests
from pydantic import SecretStr

from server.client import account_client, as_admin, call
from server.database import stop_postgres
from server.process import running
from server.readiness import examine
from server.settings import ServerSettings
from tests.server.conftest import make_secrets
from tests.tools.processes import PATIENCE

pytestmark = pytest.mark.xdist_group("server")


def failed(settings):
    return {finding.name: finding.text for finding in examine(settings) if not finding.ok}


def test_a_good_server_passes(local, workshop):
    assert failed(local.settings) == {}
    assert failed(workshop.settings) == {}
    names = [finding.name for finding in examine(workshop.settings)]
    assert names == ["process", "database", "queries", "artifacts", "disk", "accounts"]
    assert not list(Path(workshop.settings.artifact_root).glob("check-*"))


def test_the_command_exits_with_1_and_names_what_fails(tmp_path):
    environment = os.environ | {"MLFLOW_DEMO_SERVER_FOLDER": str(tmp_path), "MLFLOW_DEMO_SERVER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-m", "server", "check"], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1 and "FIX   process" in done.stdout and done.stderr == ""


def test_a_wrong_password_is_named(workshop):
    wrong = workshop.settings.model_copy(update={"admin_password": SecretStr("not the password")})
    assert "administrator's password" in failed(wrong)["queries"]


@pytest.mark.parametrize("known", ["admin", "wrong"])
def test_a_login_in_the_users_netrc_is_not_used(workshop, tmp_path, monkeypatch, known):
    login = workshop.admin if known == "admin" else ("nobody", "not-a-password")
    (file := tmp_path / "netrc").write_text("machine 127.0.0.1 login {} password {}\n".format(*login))
    monkeypatch.setenv("NETRC", str(file))
    assert requests.get(f"{workshop.url}/version").request.headers["Authorization"]
    assert failed(workshop.settings) == {}
    assert call(workshop.settings, "GET", "/api/2.0/mlflow/users/current", nobody=True).status_code == 401
    with as_admin(workshop.settings):
        assert account_client(workshop.url).get_user(workshop.admin[0]).is_admin
    assert os.environ["NETRC"] == str(file)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    settings = ServerSettings(
        profile="workshop", folder=tmp_path_factory.mktemp("own"), port=free_port(), **make_secrets()
    )
    with running(settings) as server:
        yield settings, server


def test_an_artifact_folder_that_is_gone_is_named_and_not_made_anew(own):
    settings, _ = own
    folder = settings.artifact_folder
    folder.rename(folder.with_name("elsewhere"))
    for _ in range(2):
        assert "artifacts does not exist" in failed(settings)["artifacts"]
    folder.with_name("elsewhere").rename(folder)
    assert failed(settings) == {}


def test_artifacts_that_cannot_be_written_are_named(own):
    settings, _ = own
    root = Path(settings.artifact_root)
    root.rmdir()
    root.touch()
    try:
        assert set(failed(settings)) == {"artifacts", "disk"}
    finally:
        root.unlink()
        root.mkdir()


def test_a_stopped_database_is_named_while_health_says_ok(own):
    settings, server = own
    stop_postgres(settings)
    assert requests.get(f"{settings.url}/health", timeout=5).text == "OK"
    start = time.monotonic()
    found = failed(settings)
    assert "database" in found and "queries" in found and time.monotonic() - start < 15
    server.start_postgres()
    assert failed(settings) == {}


def test_a_server_that_hangs_is_named_in_time(own):
    settings, server = own
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        found = failed(settings)
        assert {"queries", "artifacts", "accounts"} <= found.keys() and time.monotonic() - start < 15
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)


def test_a_full_disk_is_named_also_where_only_artifacts_are_on_it(tmp_path, monkeypatch):
    (tmp_path / "artifacts").mkdir()
    monkeypatch.setattr(
        "server.readiness.shutil.disk_usage", lambda at: SimpleNamespace(free=1e8 if at.name == "artifacts" else 1e12)
    )
    found = failed(ServerSettings(folder=tmp_path, port=free_port()))
    assert found["disk"] == f"0.1 GB free in {tmp_path / 'artifacts'}: free 1 GB."


@pytest.mark.parametrize("profile", ["local", "workshop"])
def test_a_server_that_never_ran_is_one_sentence_for_each_part(tmp_path, profile):
    settings = ServerSettings(profile=profile, folder=tmp_path / "none", port=free_port(), **make_secrets())
    found = failed(settings)
    assert found.keys() >= {"process", "database", "queries", "artifacts", "disk"}
    assert all("HTTPConnectionPool" not in text for text in found.values())
    assert f"{tmp_path / 'none'} does not exist" in found["disk"] and not (tmp_path / "none").exists()


def test_a_database_that_is_gone_is_named(tmp_path):
    found = failed(ServerSettings(folder=tmp_path, port=free_port()))
    assert found["database"].startswith("the database is gone")
