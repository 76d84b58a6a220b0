"""A small load loses nothing on both profiles, and the settings that see to it reach the processes."""

import configparser
import os
import sys
from pathlib import Path

import psutil
import pytest

from server.process import command, read_state
from tests.tools.load import METRICS, load

pytestmark = pytest.mark.xdist_group("server")
CLIENTS = 12


@pytest.fixture(params=["workshop", "local"])
def site(request):
    return request.getfixturevalue(request.param)


def processes(site):
    """Return the server's processes."""
    leader = psutil.Process(read_state(site.settings)["server"])
    return [leader, *leader.children(recursive=True)]


@pytest.mark.slow
def test_nothing_is_lost(site):
    outcome = load(site.target, CLIENTS, asynchronous=CLIENTS // 2)
    assert outcome.arrived == CLIENTS * METRICS and outcome.repeated == 0, outcome
    assert (outcome.unfinished, outcome.incomplete, outcome.errors) == (0, 0, []), outcome
    assert outcome.bad_answers == 0, outcome


@pytest.mark.skipif(sys.platform != "linux", reason="reads what a process was started with")
def test_the_settings_reach_every_process(site):
    expected = {
        "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "20",
        "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "80",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for process in processes(site):
        found = process.environ()
        assert {name: found.get(name) for name in expected} == expected, process
    workers = [each for each in processes(site) if "multiprocessing.spawn" in " ".join(each.cmdline())]
    assert len(workers) == (2 if site.settings.accounts else 0)  # uvicorn runs a single worker in its own process
    for worker in workers or processes(site)[-1:]:
        assert worker.environ()["MLFLOW_SERVER_X_FRAME_OPTIONS"] == "DENY"
        assert "uvloop" in Path(f"/proc/{worker.pid}/maps").read_text()
    assert not [each for each in processes(site) if "job" in " ".join(each.cmdline())]
    leader = processes(site)[0].cmdline()
    assert leader[-len(command(site.settings)) :] == command(site.settings)
    assert any("--timeout-worker-healthcheck=60" in argument for argument in leader)


def test_accounts_are_configured_in_a_private_file(workshop):
    path = workshop.settings.folder / "auth.ini"
    config = configparser.ConfigParser(interpolation=None)
    config.read(path)
    assert config["mlflow"]["auth_cache_ttl_seconds"] == "60"
    assert config["mlflow"]["default_permission"] == "NO_PERMISSIONS"
    assert os.name != "posix" or path.stat().st_mode & 0o077 == 0
    assert processes(workshop)[0].environ()["MLFLOW_AUTH_CONFIG_PATH"] == str(path)


def test_no_secret_is_on_a_command_line(workshop):
    lines = [" ".join(process.cmdline()) for process in processes(workshop)]
    assert len(lines) > 2 and workshop.settings.hidden
    assert not [line for line in lines for secret in workshop.settings.hidden if secret in line]
