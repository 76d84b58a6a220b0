"""A server in the background: it says why it doesn't start, and is gone with the process that wanted it."""

import subprocess
import sys

from demo_lib.config import ROOT, DemoError
from demo_lib.ops.processes import free_port

import pytest

from server.background import launch
from server.settings import PREFIX, ServerSettings
from tests.tools.processes import PATIENCE, team_servers, wait_until

KILLED = """
import os, sys
from pathlib import Path
from server.background import launch
from server.settings import ServerSettings
server = launch(ServerSettings(folder=Path(sys.argv[1]), port=int(sys.argv[2])))
print(server.url, flush=True)
os.kill(os.getpid(), 9)
"""


def test_what_start_refuses_is_raised_whatever_the_environment_has(tmp_path, monkeypatch):
    settings = ServerSettings(profile="workshop", folder=tmp_path, port=free_port())
    monkeypatch.setenv(f"{PREFIX}ADMIN_PASSWORD", "of another server")
    with pytest.raises(DemoError, match=r"^MLFLOW_DEMO_SERVER_ADMIN_PASSWORD must be 12"):
        launch(settings)


def test_a_start_that_is_cut_off_names_its_log(tmp_path, monkeypatch):
    (program := tmp_path / "python").write_text("#!/bin/sh\necho starting MLflow")
    program.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(DemoError, match=r"^the server ended before it answered: look into .*start\.log\.$"):
        launch(ServerSettings(folder=tmp_path, port=free_port()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_nothing_is_left_when_the_process_that_launched_it_is_killed(home, tmp_path, monkeypatch):
    port = free_port()
    monkeypatch.setenv(f"{PREFIX}DATABASE", "postgresql://of.another.server/mlflow")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "server"), str(port)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert (done.returncode, done.stdout.strip()) == (-9, f"http://127.0.0.1:{port}"), done.stderr
    wait_until(lambda: not team_servers(home))
