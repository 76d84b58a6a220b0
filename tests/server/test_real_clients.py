"""Clients that we did not write, as a participant of the workshop profile: curl, and MLflow's command line."""

import json
import os
import subprocess
import sys
import uuid

import pytest
import requests

from tests.tools.packages import find_program
from tests.tools.processes import PATIENCE

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server")]

API = "/api/2.0/mlflow"


@pytest.fixture(scope="module")
def login(workshop):
    """A participant's name and password."""
    made = (f"carl-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex)
    call = {"json": dict(zip(("username", "password"), made, strict=True)), "auth": workshop.admin}
    assert requests.post(f"{workshop.url}{API}/users/create", **call).status_code == 200
    return made


@pytest.fixture
def curl(workshop, login, tmp_path):
    """Call the REST API with curl, which takes the password from a file, and return the answer."""
    program, netrc = find_program("curl", "curl"), tmp_path / "netrc"
    netrc.touch(0o600)
    netrc.write_text(f"machine 127.0.0.1 login {login[0]} password {login[1]}\n")

    def call(path, body=None):
        command = [program, "--silent", "--show-error", "--fail-with-body", "--netrc-file", str(netrc)]
        command += [] if body is None else ["--json", json.dumps(body)]
        done = subprocess.run([*command, f"{workshop.url}{path}"], capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    return call


@pytest.fixture
def mlflow(workshop, login, tmp_path):
    """Run MLflow's command line as the participant, and return what it prints."""
    known = {"MLFLOW_TRACKING_URI": workshop.url, "MLFLOW_TRACKING_USERNAME": login[0]}
    known |= {"MLFLOW_TRACKING_PASSWORD": login[1]}

    def call(*arguments):
        command = [sys.executable, "-m", "mlflow", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, env=os.environ | known
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def test_curl_logs_a_run(curl):
    experiment = curl(f"{API}/experiments/create", {"name": f"curl-{uuid.uuid4().hex}"})["experiment_id"]
    run = curl(f"{API}/runs/create", {"experiment_id": experiment, "start_time": 1})["run"]["info"]["run_id"]
    for step, loss in enumerate((0.5, 0.25)):
        point = {"run_id": run, "key": "loss", "value": loss, "timestamp": step + 1, "step": step}
        assert curl(f"{API}/runs/log-metric", point) == {}
    curl(f"{API}/runs/update", {"run_id": run, "status": "FINISHED", "end_time": 2})

    search = {"experiment_ids": [experiment], "filter": "metrics.loss < 0.3 and attributes.status = 'FINISHED'"}
    assert [found["info"]["run_id"] for found in curl(f"{API}/runs/search", search)["runs"]] == [run]
    history = curl(f"{API}/metrics/get-history?run_id={run}&metric_key=loss")["metrics"]
    assert [(point["step"], point["value"]) for point in history] == [(0, 0.5), (1, 0.25)]


def test_mlflows_command_line(mlflow, curl, tmp_path):
    name = f"command-{uuid.uuid4().hex}"
    mlflow("experiments", "create", "--experiment-name", name)
    experiment = curl(f"{API}/experiments/get-by-name?experiment_name={name}")["experiment"]["experiment_id"]
    assert name in mlflow("experiments", "search")
    run = curl(f"{API}/runs/create", {"experiment_id": experiment, "start_time": 1})["run"]["info"]["run_id"]
    assert run in mlflow("runs", "list", "--experiment-id", experiment)

    sent = tmp_path / "sent.bin"
    sent.write_bytes(os.urandom(100_000))
    mlflow("artifacts", "log-artifact", "--local-file", sent, "--run-id", run, "--artifact-path", "data")
    mlflow("artifacts", "download", "--run-id", run, "--artifact-path", "data", "--dst-path", tmp_path / "back")
    assert (tmp_path / "back" / "data" / "sent.bin").read_bytes() == sent.read_bytes()
