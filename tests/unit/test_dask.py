"""Batches on a Dask cluster: one parent and a child a job, whatever dies; what they made comes from the store."""

import re
import shutil
import signal
from pathlib import Path

from demo_lib.config import ROOT

import mlflow
import nbformat
import pytest
from mlflow import MlflowClient

from tests.tools.batches import batch_id, kernels_of, runs_of_batch
from tests.tools.dask import DaskCluster, named
from tests.tools.processes import PATIENCE, mlflow_server, wait_until

KILL_WORKER = (
    "import psutil\n"
    "[each.kill() for each in psutil.Process().parents() if 'distributed.cli.dask_worker' in each.cmdline()]\n"
    "import time; time.sleep(600)"
)


@pytest.fixture
def dask(home, tmp_path, monkeypatch):
    """Start a scheduler that gives a task up when so many more of its workers have died; it has no workers yet."""
    made = []

    def call(failures=3):
        monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", str(failures))
        (tmp_path / "dask").mkdir()
        made.append(DaskCluster(tmp_path / "dask"))
        return made[0]

    yield call
    for each in made:
        each.close()


@pytest.fixture
def sets(tmp_path):
    """Write the sets of a sweep, as `number: [1, 2]`, and return the options that name them and the output's folder."""

    def call(*numbers):
        (tmp_path / "sets.yaml").write_text(f"number: {[*numbers]}")
        return ["--sweep", tmp_path / "sets.yaml", "--output", tmp_path / "out"]

    return call


@pytest.fixture
def two_of_three(start, dask, notebook, sets, waiting, tmp_path):
    """Start a sweep of three jobs on a cluster of two workers, and return both when two of the jobs have begun."""

    def call():
        path, cluster = notebook("small", "number: int = 1", waiting, "print(number)"), dask()
        for _ in range(2):
            cluster.add_worker()
        process = start(path, *sets(1, 2, 3), "--dask", cluster.address)
        wait_until(lambda: len([*tmp_path.glob("began-*")]) == 2)
        return cluster, process

    return call


def executed(tmp_path, name):
    """Return what the cells of an executed notebook have printed."""
    assert (tmp_path / "out" / name / "small.html").stat().st_size > 10_000
    cells = nbformat.read(tmp_path / "out" / name / "small.ipynb", 4).cells
    return "".join(each.text for cell in cells for each in cell.get("outputs", []) if "text" in each)


def statuses():
    """Return the status of the parent and those of its children by what tells them apart."""
    parent, children = runs_of_batch()
    return parent.info.status, {int(run.data.params["number"]): run.info.status for run in children.values()}


def test_another_machine_runs_a_sweep_of_a_notebook_that_only_this_one_has(start, dask, notebook, sets, tmp_path):
    show = "import os\nprint('in', os.environ['DEMO_HOME'], os.environ['OMP_NUM_THREADS'])\n7 // number"
    path, cluster = notebook("small", "number: int = 1", show), dask()
    (tmp_path / "store").mkdir()
    with mlflow_server(tmp_path / "store") as url:
        process = start(path, *sets(1, 0), "--dask", cluster.address, MLFLOW_TRACKING_URI=url)
        said = tmp_path / "said"
        wait_until(lambda: re.search("^batch ", said.read_text(), re.M) or process.poll() is not None)
        found = batch_id(said.read_text())
        mlflow.set_tracking_uri(url)
        wait_until(lambda: mlflow.artifacts.list_artifacts(run_id=found, artifact_path="notebooks"))
        assert f"scheduler at {cluster.address} has no workers yet: the tasks wait for them." in said.read_text()
        Path(path).unlink()  # as if it had never been on the workers' machine
        for number in range(2):
            host = named("elsewhere", tmp_path / f"names-{number}")
            own = {"DEMO_HOME": str(tmp_path / "far"), "OMP_NUM_THREADS": "", "MLFLOW_EXPERIMENT_ID": "99"}
            cluster.add_worker(**own, **host)
        assert process.wait(PATIENCE) == 1
        text = said.read_text()
        assert re.search(r"^number  status    seconds\n1 +FINISHED +\d+\.\d\n0 +FAILED +\d+\.\d$", text, re.M)
        assert "small number=0: cell [3] failed with ZeroDivisionError" in text
        assert f"The executed notebooks are in {tmp_path / 'out'}." in text
        for name in ("small number=1", "small number=0"):
            assert executed(tmp_path, name).startswith(f"in {tmp_path / 'far'} 1\n")
        client = MlflowClient(url)
        runs = client.search_runs([client.get_experiment_by_name("batch").experiment_id])
        (parent,) = [run for run in runs if run.info.run_id == found]
        children = {run.info.run_name: run for run in runs if run is not parent}
        assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {found} and len(runs) == 3
        assert {run.data.tags["process"].partition(":")[0] for run in children.values()} == {"elsewhere"}
        assert parent.info.status == "FAILED"
        assert {name[-1]: run.info.status for name, run in children.items()} == {"1": "FINISHED", "0": "FAILED"}


def test_a_killed_worker_costs_its_job_nothing_but_time(start, dask, notebook, sets, waiting, tmp_path):
    path, cluster = notebook("small", "number: int = 1", waiting, "print(number)"), dask()
    worker = cluster.add_worker()
    process = start(path, *sets(1), "--dask", cluster.address)
    wait_until((tmp_path / "began-1").exists)
    (before,) = runs_of_batch()[1].values()
    worker.kill()
    (tmp_path / "began-1").unlink()
    cluster.add_worker()
    wait_until((tmp_path / "began-1").exists)
    (tmp_path / "go").touch()
    assert process.wait(PATIENCE) == 0, (tmp_path / "said").read_text()
    (after,) = runs_of_batch()[1].values()
    assert after.info.run_id == before.info.run_id and after.data.tags["process"] != before.data.tags["process"]
    assert statuses() == ("FINISHED", {1: "FINISHED"}) and "error" not in after.data.tags


@pytest.mark.slow
def test_a_job_that_kills_its_workers_fails_and_the_others_go_on(start, dask, notebook, sets, tmp_path):
    path = notebook("small", "number: int = 1", f"if number == 1:\n{indented(KILL_WORKER)}")
    cluster = dask(failures=1)
    for _ in range(3):
        cluster.add_worker()
    process = start(path, *sets(1, 2, 3), "--dask", cluster.address)
    assert process.wait(PATIENCE) == 1
    assert statuses() == ("FAILED", {1: "FAILED", 2: "FINISHED", 3: "FINISHED"})
    said = (tmp_path / "said").read_text()
    error = runs_of_batch()[1]["small number=1"].data.tags["error"]
    assert error.startswith("Attempted to run task") and f"small number=1: {error}" in said


def indented(code):
    return "\n".join(f"    {line}" for line in code.splitlines())


def test_ctrl_c_ends_the_jobs_on_the_cluster_and_the_batch_can_go_on(start, two_of_three, tmp_path):
    cluster, process = two_of_three()
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    parent, children = statuses()
    assert parent == "KILLED" and [*children.values()] == ["KILLED"] * 2
    said = (tmp_path / "said").read_text()
    assert len(re.findall(r"^\d +KILLED", said, re.M)) == 2 and len(re.findall(r"^\d +NOT RUN", said, re.M)) == 1
    found, before = batch_id(said), {run.info.run_id for run in runs_of_batch()[1].values()}
    wait_until(lambda: not kernels_of(found))
    again = re.search(rf"interrupted: `\S+ -m demo_lib run (--resume {found} --dask {cluster.address})` goes on", said)
    (tmp_path / "go").touch()
    assert start(*again[1].split()).wait(PATIENCE) == 0
    assert statuses() == ("FINISHED", {1: "FINISHED", 2: "FINISHED", 3: "FINISHED"})
    after = runs_of_batch()[1]
    assert before < {run.info.run_id for run in after.values()}
    assert not [run for run in after.values() if "error" in run.data.tags]
    assert [executed(tmp_path, f"small number={number}") for number in (1, 2, 3)] == ["1\n", "2\n", "3\n"]


@pytest.mark.slow
def test_a_killed_coordinator_costs_only_what_had_not_finished(start, two_of_three, tmp_path):
    _, process = two_of_three()
    found = batch_id((tmp_path / "said").read_text())
    process.kill()
    process.wait()
    first, second = sorted(int(each.name[-1]) for each in tmp_path.glob("began-*"))
    (tmp_path / f"go-{first}").touch()
    wait_until(lambda: statuses()[1][first] == "FINISHED")
    assert statuses() == ("RUNNING", {first: "FINISHED", second: "RUNNING"})
    before = runs_of_batch()[1]
    for each in tmp_path.glob("began-*"):
        each.unlink()
    old = kernels_of(found)
    process = start("--resume", found)  # here, and not on the cluster
    wait_until(lambda: (tmp_path / f"began-{second}").exists() or process.poll() is not None)
    assert not {*kernels_of(found)} & {*old}
    (tmp_path / "go").touch()
    assert process.wait(PATIENCE) == 0, (tmp_path / "said").read_text()
    assert statuses() == ("FINISHED", {1: "FINISHED", 2: "FINISHED", 3: "FINISHED"})
    assert not (tmp_path / f"began-{first}").exists()
    after = runs_of_batch()[1]
    assert {name: after[name].info.run_id for name in before} == {name: run.info.run_id for name, run in before.items()}
    assert [executed(tmp_path, f"small number={number}") for number in (1, 2, 3)] == ["1\n", "2\n", "3\n"]


@pytest.mark.slow
def test_a_scheduler_that_is_gone_ends_the_batch_by_one_sentence(start, dask, notebook, sets, waiting, tmp_path):
    path, cluster = notebook("small", "number: int = 1", waiting), dask()
    cluster.add_worker()
    process = start(path, *sets(1, 2), "--dask", cluster.address)
    wait_until((tmp_path / "began-1").exists)
    cluster.scheduler.kill()
    assert process.wait(PATIENCE) == 2
    said = (tmp_path / "said").read_text()
    assert "error: the Dask scheduler has lost the tasks, or the connection to it is gone" in said
    assert statuses() == ("FAILED", {1: "KILLED"})
    wait_until(lambda: not kernels_of(batch_id(said)))


def test_a_file_on_this_machine_is_no_store_for_another_one(start, dask, notebook, tmp_path):
    cluster = dask()
    cluster.add_worker(**named("elsewhere", tmp_path / "names"))
    process = start(notebook("small", "number: int = 1"), "--dask", cluster.address, "--output", tmp_path / "out")
    assert process.wait(PATIENCE) == 2
    assert "error: elsewhere can't open a file of " in (tmp_path / "said").read_text().splitlines()[-1]
    parent, children = runs_of_batch()
    assert parent.info.status == "FAILED" and not children


@pytest.mark.slow
def test_a_lesson_runs_in_the_workers_checkout_which_must_have_the_same(start, dask, notebook, tmp_path):
    shutil.copytree(ROOT / "demo_lib", tmp_path / "other" / "demo_lib")
    (tmp_path / "other" / "notebooks").mkdir()
    lesson = tmp_path / "other" / "notebooks" / "00_start_here.ipynb"
    lesson.write_bytes((ROOT / "notebooks" / lesson.name).read_bytes() + b"\n")
    cluster = dask()
    worker = cluster.add_worker(PYTHONPATH=str(tmp_path / "other"))
    small = notebook("small", "number: int = 1", "import demo_lib\nprint(demo_lib.__file__)")
    process = start("00", small, "--dask", cluster.address, "--output", tmp_path / "out")
    assert process.wait(PATIENCE) == 1
    said = (tmp_path / "said").read_text()
    assert re.search(
        r"^00_start_here: \S+: the batch runs another 00_start_here.ipynb than .*: the checkouts differ,",
        said,
        re.M,
    )
    assert str(tmp_path / "other" / "demo_lib") in (tmp_path / "out" / "small.ipynb").read_text()
    assert {name: run.info.status for name, run in runs_of_batch()[1].items()} == {
        "00_start_here": "FAILED",
        "small": "FINISHED",
    }
    worker.kill()
    cluster.add_worker()
    assert start("--resume", batch_id(said), "--dask", cluster.address).wait(PATIENCE) == 0
    parent, children = runs_of_batch()
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    assert (tmp_path / "out" / "00_start_here.html").stat().st_size > 10_000


def test_a_cluster_is_not_told_how_many_jobs_it_does_at_once(cli, notebook):
    refused = cli("run", notebook("small", "number: int = 1"), "--dask", "tcp://127.0.0.1:1", "--jobs", "2")
    assert refused.returncode == 2
    assert refused.stderr == "error: a Dask cluster knows how many jobs it does at once: leave out --jobs.\n"
