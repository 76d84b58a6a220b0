"""A batch that ended in whatever way goes on: what finished is kept, the rest is done in the same runs."""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo_lib.config import ROOT, tracking_uri
from demo_lib.ops import batch, execution
from demo_lib.ops.jobs import sweep
from demo_lib.store import connect

import mlflow
import nbformat
import psutil
import pytest
from mlflow import MlflowClient

from tests.tools.batches import batch_id, kernels_of, runs_of_batch
from tests.tools.processes import PATIENCE, wait_until


def test_what_failed_is_tried_again_in_its_own_run(cli, notebook, tmp_path):
    count = f"open({str(tmp_path / 'log')!r}, 'a').write(f'{{number}} ')"
    fail = f"import pathlib\nassert number == 1 or pathlib.Path({str(tmp_path / 'cured')!r}).exists(), 'ill'"
    path = notebook("small", "number: int = 1", count, fail)
    (tmp_path / "sets.yaml").write_text("number: [1, 2, 3]")
    first = cli("run", path, "--sweep", tmp_path / "sets.yaml", "--output", tmp_path / "out", "--jobs", 1)
    assert first.returncode == 1 and "AssertionError: ill" in first.stdout
    before = {name: run.info.run_id for name, run in runs_of_batch()[1].items()}
    (tmp_path / "cured").touch()
    again = cli("run", "--resume", batch_id(first.stdout)[:8], "--jobs", 1)
    assert again.returncode == 0 and "ill" not in again.stdout, again.stdout + again.stderr
    assert f"The executed notebooks are in {tmp_path / 'out'}." in again.stdout
    parent, children = runs_of_batch()
    assert {name: run.info.run_id for name, run in children.items()} == before
    assert {run.info.status for run in [parent, *children.values()]} == {"FINISHED"}
    assert not [run for run in [parent, *children.values()] if "error" in run.data.tags]
    assert parent.data.metrics["failed_lessons"] == 0
    rows = mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/jobs.csv").splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["FINISHED"] * 3
    assert (tmp_path / "log").read_text() == "1 2 3 2 3 "
    last = cli("run", "--resume", batch_id(first.stdout))
    assert last.returncode == 0 and "is finished: nothing is left to do." in last.stdout
    assert (tmp_path / "log").read_text() == "1 2 3 2 3 "


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_batch_of_lessons_says_how_to_go_on(start, cli, notebook, waiting, tmp_path, signum):
    names = [
        notebook("done", "number: int = 1"),
        notebook("slow", "number: int = 1", waiting),
        notebook("later", "number: int = 1"),
    ]
    process = start(*names, "--jobs", 1, "--output", tmp_path / "out")
    wait_until((tmp_path / "began-1").exists)
    process.send_signal(signum)
    assert process.wait(PATIENCE) == (130 if signum == signal.SIGINT else -signum)
    said = (tmp_path / "said").read_text()
    command = re.search(r"interrupted: `\S+ -m demo_lib (run --resume [0-9a-f]{32})` goes on from here\.", said)[1]
    (tmp_path / "go").touch()
    again = cli(*command.split())
    assert again.returncode == 0, again.stderr
    assert "done: finished" not in again.stdout and "slow: finished" in again.stdout
    parent, children = runs_of_batch()
    assert {*children} == {"done", "slow", "later"}
    assert {run.info.status for run in [parent, *children.values()]} == {"FINISHED"}
    assert not [run for run in [parent, *children.values()] if "error" in run.data.tags]


def test_a_batch_that_still_runs_is_not_resumed(start, cli, notebook, waiting, tmp_path):
    process = start(notebook("slow", "number: int = 1", waiting))
    wait_until((tmp_path / "began-1").exists)
    found = batch_id((tmp_path / "said").read_text())
    refused = cli("run", "--resume", found)
    assert refused.returncode == 2
    todo = f"batch {found} still runs, in process {process.pid}: wait for its end, or end it."
    assert refused.stderr == f"error: {todo}\n"
    (tmp_path / "go").touch()
    assert process.wait(PATIENCE) == 0
    assert runs_of_batch()[0].info.status == "FINISHED"


def test_a_batch_of_another_machine_is_not_resumed_while_it_may_run(cli, notebook, tmp_path):
    first = cli("run", notebook("bad", "number: int = 1", "1 / 0"))
    found = batch_id(first.stdout)
    client = MlflowClient(tracking_uri())
    client.set_tag(found, "process", "elsewhere:1a2b3c4d:1a2b3c4d:1:77:88")
    client.update_run(found, "RUNNING")
    refused = cli("run", "--resume", found)
    assert refused.returncode == 2 and "may still run on elsewhere: resume it there or, if" in refused.stderr
    client.set_terminated(found, "KILLED")
    assert cli("run", "--resume", found).returncode == 1


def test_what_can_not_be_resumed_is_named(cli, notebook, tmp_path):
    path = notebook("bad", "number: int = 1", "1 / 0")
    first = cli("run", path)
    found, child = batch_id(first.stdout), runs_of_batch()[1]["bad"].info.run_id
    with mlflow.start_run(experiment_id=connect("other").experiment_id) as other:
        pass
    for arguments, message in [
        (["01", "--resume", found], "--resume takes all from the batch: leave out everything but --jobs and --dask."),
        (["--resume", found, "-p", "number", "1"], "--resume takes all from the batch"),
        (["--resume", found, "--output", "x"], "--resume takes all from the batch"),
        (["--resume", "zz"], "no run's id begins with 'zz'"),
        (["--resume", child], f"is no batch, or has no plan of its jobs: give its parent's id, {found}."),
        (["--resume", other.info.run_id], "is no batch, or has no plan of its jobs: if it was killed before its first"),
    ]:
        refused = cli("run", *arguments)
        assert refused.returncode == 2 and message in refused.stderr
    notebook("bad", "number: int = 1", "2 / 0")
    assert f"{path} has changed since the batch began: undo that" in cli("run", "--resume", found).stderr
    Path(path).unlink()
    assert f"{path} is gone: bring it back, or begin a new batch." in cli("run", "--resume", found).stderr
    assert runs_of_batch()[0].info.status == "FAILED"  # untouched


def test_a_home_may_move_before_a_batch_goes_on(home, cli, notebook, tmp_path):
    moved = f"import os; assert os.environ['DEMO_HOME'] == {str(tmp_path / 'moved')!r}"
    first = cli("run", notebook("bad", "number: int = 1", moved))
    assert first.returncode == 1
    home.rename(tmp_path / "moved")
    home.mkdir()  # for the command to work in
    again = cli("run", "--resume", batch_id(first.stdout), DEMO_HOME=str(tmp_path / "moved"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "moved" / "build" / "bad.html").is_file() and not list(home.iterdir())


def test_a_kernel_ends_with_its_owner_even_before_it_has_started(tmp_path):
    (tmp_path / "ipykernel_launcher.py").write_text("import time; print('up', flush=True); time.sleep(600)")
    command = [sys.executable, str(ROOT / "demo_lib" / "ops" / "kernel.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, env=os.environ | {"PYTHONPATH": str(tmp_path)}) as kernel:
        assert kernel.stdout.readline().strip() == b"up"
        kernel.stdin.close()
        assert kernel.wait(PATIENCE) == 1


@pytest.mark.slow
def test_a_sweep_killed_twice_is_done_once_in_the_end(start, notebook, tmp_path):
    tracked = (
        "import os, time, mlflow\nfrom demo_lib import store, tracking\nstore.connect('small')\n"
        "with mlflow.start_run(tags=tracking.provenance()): time.sleep(0.3)"
    )
    path = notebook("small", "number: int = 1\nrate: float = 0.1", tracked)
    (tmp_path / "sets.yaml").write_text(f"number: {[*range(10)]}\nrate: [0.1, 0.2, 1.0e-5]")
    process, said = start(path, "--sweep", tmp_path / "sets.yaml", "--output", tmp_path / "out"), tmp_path / "said"
    wait_until(lambda: said.read_text().count("\n"))
    found = batch_id(said.read_text())
    for _ in range(2):
        wait_until(lambda: said.read_text().count("finished in") >= 4)
        time.sleep(moment := random.uniform(0, 2))  # at any step of a job
        process.kill()
        process.wait()
        wait_until(lambda: not kernels_of(found))
        process = start("--resume", found)
    assert process.wait(PATIENCE) == 0, f"killed after {moment:.3f} s: {said.read_text()}"
    parent, children = runs_of_batch()
    assert parent.info.run_id == found and len(children) == 30
    assert {run.info.status for run in [parent, *children.values()]} == {"FINISHED"}
    assert not [run for run in [parent, *children.values()] if "error" in run.data.tags]
    assert len({(run.data.params["number"], run.data.params["rate"]) for run in children.values()}) == 30
    for name, run in children.items():
        executed = nbformat.read(tmp_path / "out" / name / "small.ipynb", 4)
        assert str(executed.metadata.papermill.parameters.number) == run.data.params["number"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*children}
    assert not mlflow.search_runs(search_all_experiments=True, filter_string="status = 'RUNNING'").size
    assert not kernels_of(found)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(psutil.Process, "num_fds"), reason="Windows has no file descriptors")
def test_two_hundred_executions_leave_nothing_behind(home, notebook, tmp_path, monkeypatch):
    for name in ("temporary", "runtime"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))  # of the kernels' connection files
    this, measured, real = psutil.Process(), [], execution.run_job
    others = {*this.children(recursive=True)}  # servers of other tests

    def measure():
        files = [path for name in ("temporary", "runtime") for path in (tmp_path / name).rglob("*")]
        return {
            "handles": this.num_fds(),
            "threads": this.num_threads(),
            "processes": len({*this.children(recursive=True)} - others),
            "files": len(files),
            "memory": this.memory_info().rss / 2**20,
        }

    def run_job(*arguments):
        done = real(*arguments)
        measured.append(measure())
        return done

    monkeypatch.setattr(execution, "run_job", run_job)
    path = notebook("small", "number: int = 1", "print(number)")
    jobs = sweep([path], [{"number": number} for number in range(200)], {}, tmp_path / "out")
    batch.run(jobs, workers=2)
    assert [job.status for job in jobs] == ["FINISHED"] * 200 and len(measured) == 200
    early, late = measured[40:60], measured[180:]
    least = {name: [min(each[name] for each in part) for part in (early, late)] for name in early[0]}
    for name, (before, after) in least.items():  # the least, as the other job of two is somewhere in its course
        assert after <= before + (30 if name == "memory" else 3), least  # MiB, or a number
    left = measure()
    assert (left["processes"], left["files"]) == (0, 0)
