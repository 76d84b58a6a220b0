"""Workers elsewhere: a study is stopped for all of them, and clusters are told commands that this project knows."""

import ast
import shlex
import signal
import socket
import subprocess
import sys

from demo_lib.__main__ import _parser
from demo_lib.config import ROOT, DemoError
from demo_lib.ops import workers
from demo_lib.ops.cluster import answer, run_elsewhere, submit
from demo_lib.ops.processes import free_port
from demo_lib.study import open_storage

import mlflow
import optuna
import pytest
import yaml

from tests.tools.dask import DaskCluster, named
from tests.tools.processes import PATIENCE
from tests.unit.test_tuning import await_children, config, family, start

CLUSTER = ROOT / "docs" / "cluster"


def joined(words):
    """Return the study that the words of a command join."""
    assert words[:2] == ["-m", "demo_lib"]
    return _parser().parse_args(words[2:]).join


def test_the_slurm_script_joins_the_study_that_it_is_given(tmp_path):
    script = CLUSTER / "slurm.sh"
    options = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    assert {option.partition("=")[0] for option in options} >= {"--array", "--cpus-per-task", "--time", "--output"}
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\necho "$OMP_NUM_THREADS $$ $@"\n')
    python.chmod(0o755)
    process = subprocess.Popen(
        ["bash", script, "night shift"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={"SLURM_CPUS_PER_TASK": "4"},
    )
    threads, pid, *words = process.communicate(timeout=PATIENCE)[0].rstrip("\n").split(" ", 6)
    assert (threads, int(pid)) == ("4", process.pid)  # the same process: SLURM's signals reach it
    assert joined(words) == "night shift"


def test_the_kubernetes_job_joins_a_study_and_takes_secrets_from_a_secret():
    job = yaml.safe_load((CLUSTER / "kubernetes.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][0] == ".venv/bin/python" and joined(container["command"][1:]) == "night"
    assert container["envFrom"] == [{"secretRef": {"name": "demo-tune"}}] and pod["restartPolicy"] == "Never"
    assert {each["name"] for each in container["env"]} == {"OMP_NUM_THREADS"}


def test_the_lines_for_jobqueue_tell_a_command_that_is_understood():
    text = (CLUSTER / "jobqueue.py").read_text()
    ast.parse(text)
    command = text.partition("terminal: ")[2].partition(" {")[0]
    given = _parser().parse_args([*shlex.split(command), "tcp://10.0.0.5:8786"])
    assert (given.study, given.workers, given.dask) == ("night", "8", "tcp://10.0.0.5:8786")


@pytest.mark.parametrize("storage", ["sqlite:////here/optuna.db", "postgresql://a:b@db/optuna"])
def test_another_machine_does_not_open_files_of_this_one(storage):
    environment = {"DEMO_STORAGE": storage, "MLFLOW_TRACKING_URI": "sqlite:////here/m.db"}
    said = f"{socket.gethostname()} can't open a file of other: give --storage a PostgreSQL"
    with pytest.raises(DemoError, match=said):
        run_elsewhere(["doctor"], environment, "other")


def test_a_cluster_that_can_not_be_is_one_sentence(home, monkeypatch):
    address = f"tcp://127.0.0.1:{free_port()}"
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    with pytest.raises(DemoError, match=f"no Dask scheduler answers at {address}"):
        workers.tune(config(), dask=address)
    with pytest.raises(DemoError, match="--dask starts as many workers as --workers says: give 1 or more"):
        workers.tune(config(workers=0), dask=address)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(DemoError, match="Dask is not installed"):
        workers.tune(config(), dask=address)


def test_a_password_is_not_in_the_log_of_a_worker_that_fails(home, tmp_path, monkeypatch):
    cluster = DaskCluster(tmp_path)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p@ss word")
        cluster.add_worker(**named("elsewhere", tmp_path / "names"))
        with workers.cluster(cluster.address) as client:
            task = submit(client, ["doctor"], {"DEMO_STORAGE": "postgresql://a:s3cret@db/o", "FILE": "sqlite:////m.db"})
            assert "elsewhere can't open a file of" in str(task.exception(PATIENCE))
        log = (tmp_path / "worker0").read_text()
        assert "Compute Failed" in log and "p@ss" not in log and "s3cret" not in log
    finally:
        cluster.close()


def test_a_worker_without_this_project_is_named_and_the_scheduler_needs_none(tmp_path):
    (tmp_path / "bare" / "demo_lib").mkdir(parents=True)
    (tmp_path / "bare" / "demo_lib" / "__init__.py").touch()  # before one that is installed
    bare = {"PYTHONPATH": str(tmp_path / "bare")}
    cluster = DaskCluster(tmp_path, **bare)
    try:
        worker = cluster.add_worker(**bare)
        with workers.cluster(cluster.address) as client:
            task = submit(client, ["--help"], {})
            task.exception(PATIENCE)
            assert answer(task) == (
                "a worker of the cluster lacks this project (No module named 'demo_lib.ops'): install it there."
            )
            worker.kill()
            cluster.add_worker()
            assert submit(client, ["--help"], {}).result(PATIENCE) == ""
    finally:
        cluster.close()


@pytest.mark.slow
def test_ctrl_c_where_a_study_was_begun_stops_workers_elsewhere(home, cli):
    mlflow.set_tracking_uri(f"sqlite:///{home}/store/mlflow.db")
    process = start("--study", "far", "--trials", "30", "--workers", "0")
    while "waiting for workers" not in process.stdout.readline():
        assert process.poll() is None
    command = [sys.executable, "-m", "demo_lib", "tune", "--join", "far"]
    joins = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    await_children(3)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert [each.communicate(timeout=PATIENCE)[1] for each in joins] == ["interrupted.\n"] * 2
    (parent,), children = family()
    assert parent.info.status == "KILLED"
    assert {run.info.status for run in children.values()} == {"FINISHED", "KILLED"}
    late = cli("tune", "--join", "far")
    assert late.returncode == 2 and "study 'far' was interrupted: `tune --study far` goes on with it" in late.stderr
    study = optuna.load_study(study_name="far", storage=open_storage())
    begun = len(study.trials)
    finished = sum(trial.state.name == "COMPLETE" for trial in study.trials)
    again = start("--study", "far", "--trials", str(finished + 1))
    assert again.wait(PATIENCE) == 0
    assert len(open_storage().get_all_trials(study._study_id)) == begun + 1
    assert family()[0][0].info.status == "FINISHED"
