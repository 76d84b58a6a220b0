"""Workers on other machines, which are network namespaces here: one study, and nothing lost or done twice."""

import os
import signal
import subprocess
import sys
from collections import Counter

from demo_lib.config import ROOT
from demo_lib.databases import connect

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from pydantic import SecretStr
from sqlalchemy import text

from server.database import database_address
from server.process import read_state, stop
from server.settings import PREFIX, ServerSettings
from server.studies import studies_address
from tests.server.conftest import make_secrets
from tests.tools.batches import batch_id, kernels_of, write_notebook
from tests.tools.packages import find_program, missing
from tests.tools.processes import PATIENCE, find_processes, normal_signals, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server")]
TRIALS = 60
SMALL = ["--trials", str(TRIALS), "--train-images", "300", "--epochs", "2", "--max-channels", "4", "--prune", "false"]
HUB, MACHINES = "10.213.0.1", ["10.213.0.2", "10.213.0.3"]


class Network:
    """Machines as network namespaces, by their address, on one bridge; each process is started in one of them."""

    def __init__(self, folder):
        self.folder = folder
        self.ip = find_program("iproute2", "ip")
        self.names = {address: f"demo{os.getpid()}-{address.rpartition('.')[2]}" for address in (HUB, *MACHINES)}
        self.started = []

    def build(self):
        if os.geteuid():
            missing("sudo: only root makes network namespaces")
        for name in self.names.values():
            self.call("netns", "add", name)
            self.call("-n", name, "link", "set", "lo", "up")
        hub = self.names[HUB]
        self.call("-n", hub, "link", "add", "bridge0", "type", "bridge")
        for number, address in enumerate(MACHINES):
            self.call(
                "-n", hub, "link", "add", f"port{number}", "type", "veth", "peer", "eth0", "netns", self.names[address]
            )
            self.call("-n", hub, "link", "set", f"port{number}", "master", "bridge0", "up")
            self.call("-n", self.names[address], "address", "add", f"{address}/24", "dev", "eth0")
            self.call("-n", self.names[address], "link", "set", "eth0", "up")
        self.call("-n", hub, "address", "add", f"{HUB}/24", "dev", "bridge0")
        self.call("-n", hub, "link", "set", "bridge0", "up")

    def call(self, *arguments):
        subprocess.run([self.ip, *arguments], check=True, capture_output=True, text=True)

    def start(self, address, *arguments, **variables):
        """Start a Python command on the machine; its output is in the file `log` of what is returned."""
        name = self.names[address]
        command = [self.ip, "netns", "exec", name, *renamed(name) * (address != HUB), sys.executable, "-m", *arguments]
        options = {"cwd": ROOT, "env": os.environ | variables, "preexec_fn": normal_signals}
        log = self.folder / f"{len(self.started)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
        process.log = log
        self.started.append(process)
        return process

    def run(self, address, *arguments, **variables):
        return self.start(address, *arguments, **variables).wait(PATIENCE)

    def remove(self):
        for process in self.started:
            process.kill()
            process.wait()
        for name in self.names.values():
            subprocess.run([self.ip, "netns", "delete", name], capture_output=True)


def renamed(name):
    """Return what, before a command, makes its machine's name another one: nobody elsewhere can tell if it lives."""
    return ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    made = Network(tmp_path_factory.mktemp("logs"))
    try:
        made.build()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def site(network, tmp_path_factory):
    """A workshop server with studies, and what a participant's processes are told."""
    folder = tmp_path_factory.mktemp("site")
    secrets = make_secrets(studies_password=SecretStr("p@ss word/of the studies"))
    settings = ServerSettings(profile="workshop", folder=folder / "data", host=HUB, studies=True, **secrets)
    variables = {"PROFILE": "workshop", "FOLDER": str(settings.folder), "HOST": HUB, "STUDIES": "true"}
    variables |= {name.upper(): secret.get_secret_value() for name, secret in secrets.items()}
    variables = {PREFIX + name: value for name, value in variables.items()}
    (folder / "names.csv").write_text("name\nzoe\n")
    server = network.start(HUB, "server", "start", **variables)
    try:
        wait_until(lambda: server.poll() is not None or read_state(settings))
        wait_until(lambda: server.poll() is not None or network.run(HUB, "server", "check", **variables) == 0, 60)
        sheet = folder / "sheet.csv"
        added = ["server", "participants", "add", str(folder / "names.csv"), "--sheet", str(sheet)]
        assert network.run(HUB, *added, **variables) == 0
        password = sheet.read_text().splitlines()[1].partition(",")[2]
        login = {"MLFLOW_TRACKING_URI": settings.url, "MLFLOW_TRACKING_USERNAME": "zoe"}
        yield settings, login | {"MLFLOW_TRACKING_PASSWORD": password, "DEMO_STORAGE": studies_address(settings)}
    finally:
        stop(settings)


def joins():
    """Return the ids of the processes that do trials."""
    return find_processes({}, "--join")


def study_of(settings, name):
    storage = database_address(settings, "optuna")  # by the socket, as this process is on no machine of the network
    with connect(storage) as connection:  # not before the study is there: a table made here is not the workers'
        if not connection.scalar(text("SELECT to_regclass('studies')")):
            return None
        if not connection.scalar(text("SELECT 1 FROM studies WHERE study_name = :name"), {"name": name}):
            return None
    return optuna.load_study(study_name=name, storage=optuna.storages.RDBStorage(storage))


def has_begun(settings, name):
    study = study_of(settings, name)
    return study is not None and "parent_run_id" in study.user_attrs


def count(settings, name, *states):
    study = study_of(settings, name)
    return len(study.get_trials(states=states, deepcopy=False)) if study else 0


def disturb(settings, name):
    """Kill one worker and end another, each in the middle of a trial, and let the tracking server restart."""
    complete = optuna.trial.TrialState.COMPLETE
    for number, disturbance in enumerate((signal.SIGKILL, "restart", signal.SIGTERM)):
        wait_until(lambda number=number: count(settings, name, complete) >= 5 + 10 * number)
        if disturbance == "restart":
            os.killpg(read_state(settings)["server"], signal.SIGKILL)
        else:
            wait_until(lambda signum=disturbance: end_in_a_trial(settings, name, signum))


def end_in_a_trial(settings, name, signum):
    """Send the signal to a worker whose trial has a child run that is open, so that there is something to lose."""
    client, states = MlflowClient(database_address(settings)), [optuna.trial.TrialState.RUNNING]
    for trial in study_of(settings, name).get_trials(states=states, deepcopy=False):
        number = int(trial.user_attrs.get("process", "::0:").split(":")[-2])
        if number in joins() and "run_id" in trial.user_attrs:
            process = psutil.Process(number)
            process.suspend()  # else the trial could end while we look
            caught = client.get_run(trial.user_attrs["run_id"]).info.status == "RUNNING"
            if caught:
                process.send_signal(signum)
            process.resume()
            if caught:
                return True
    return False


def check_study(settings, name):
    """Exactly as many trials as were asked for, each with one child of the one parent; nothing is left running."""
    trials = study_of(settings, name).trials
    states = Counter(trial.state.name for trial in trials)
    assert states["COMPLETE"] == TRIALS and not states["RUNNING"] and not states["WAITING"], states
    client = MlflowClient(database_address(settings))
    experiment = client.get_experiment_by_name("zoe/tune").experiment_id
    runs = client.search_runs([experiment], f"tags.study = '{name}'", max_results=1000)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert parent.info.status == "FINISHED" and int(parent.data.tags["trials"]) == TRIALS
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    numbers = Counter(int(run.data.tags["trial_number"]) for run in children)
    assert set(numbers.values()) == {1}
    ended = {int(run.data.tags["trial_number"]): run.info.status for run in children}
    complete = {trial.number for trial in trials if trial.state.name == "COMPLETE"}
    assert {number for number, status in ended.items() if status == "FINISHED"} == complete
    assert {status for number, status in ended.items() if number not in complete} == {"KILLED"}
    return children


def test_workers_on_two_machines_finish_one_study_whatever_dies(network, site):
    settings, login = site
    coordinator = network.start(HUB, "demo_lib", "tune", "--study", "far", "--workers", "0", *SMALL, **login)
    wait_until(lambda: coordinator.poll() is not None or has_begun(settings, "far"))
    assert coordinator.poll() is None, coordinator.log.read_text()
    workers = [network.start(address, "demo_lib", "tune", "--join", "far", **login) for address in 2 * MACHINES]
    disturb(settings, "far")
    assert coordinator.wait(2 * PATIENCE) == 0, coordinator.log.read_text()
    codes = Counter(worker.wait(PATIENCE) for worker in workers)
    assert codes == {0: 2, -signal.SIGKILL: 1, -signal.SIGTERM: 1}, [worker.log.read_text() for worker in workers]
    check_study(settings, "far")


@pytest.fixture(scope="module")
def dask(network):
    """Return the address of a Dask scheduler with two workers on each machine."""
    address = f"tcp://{HUB}:8786"
    network.start(HUB, "distributed.cli.dask_scheduler", "--host", HUB, "--no-dashboard")
    for machine in MACHINES:
        options = ["--nworkers", "2", "--nthreads", "1", "--no-dashboard", "--host", machine]
        network.start(machine, "distributed.cli.dask_worker", address, *options)
    return address


def test_a_dask_cluster_on_two_machines_finishes_one_study_whatever_dies(network, site, dask):
    settings, login = site
    study = ["--study", "dask", "--workers", "4", "--dask", dask]
    coordinator = network.start(HUB, "demo_lib", "tune", *study, *SMALL, **login)
    disturb(settings, "dask")
    assert coordinator.wait(2 * PATIENCE) == 0, coordinator.log.read_text()
    check_study(settings, "dask")
    assert not joins()


def test_a_dask_cluster_on_two_machines_runs_a_sweep_whatever_dies(network, site, dask, tmp_path):
    settings, login = site
    wait = f"import pathlib, time\npathlib.Path({str(tmp_path)!r}, str(number)).touch()\ntime.sleep(3)"
    path = write_notebook(tmp_path, "small", "number: int = 1", wait)
    (tmp_path / "sets.yaml").write_text("number: [0, 1, 2, 3, 4, 5, 6, 7]")
    options = ["--sweep", str(tmp_path / "sets.yaml"), "--output", str(tmp_path / "out"), "--dask", dask]
    coordinator = network.start(HUB, "demo_lib", "run", path, *options, **login)
    wait_until(lambda: coordinator.poll() is not None or [*tmp_path.glob("[0-7]")])
    worker = psutil.Process(kernels_of(batch_id(coordinator.log.read_text()))[0])
    while "--join" not in worker.cmdline() or "guard.py" not in " ".join(worker.cmdline()):
        worker = worker.parent()
    worker.parent().kill()
    assert coordinator.wait(PATIENCE) == 0, coordinator.log.read_text()
    client = MlflowClient(database_address(settings))
    runs = client.search_runs([client.get_experiment_by_name("zoe/batch").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert sorted(run.data.params["number"] for run in children) == [*"01234567"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    made = {each.parent.name for each in (tmp_path / "out").glob("*/small.html")}
    assert made == {f"small number={number}" for number in range(8)}
