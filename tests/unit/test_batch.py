"""The batch run: what it refuses, what it reports, and what it leaves behind when something breaks."""

import datetime
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from demo_lib.config import ROOT, DemoError, lessons
from demo_lib.ops import batch
from demo_lib.ops.batch import table
from demo_lib.ops.jobs import plan

import joblib
import mlflow
import nbformat
import papermill as pm
import pytest
from bs4 import BeautifulSoup
from mlflow import MlflowClient
from nbformat.v4 import new_code_cell

from tests.tools.batches import runs_of_batch
from tests.tools.processes import PATIENCE, normal_signals


def test_lessons_are_found_by_number_stem_file_name_and_path():
    names = ["01", "01_track_a_run", "01_track_a_run.ipynb", str(lessons()[1])]
    for name in names:
        assert [job.name for job in plan([name], {}, ROOT)] == ["01_track_a_run"]
    assert len(plan(names, {}, ROOT)) == 1
    assert [job.name for job in plan([], {}, ROOT)] == [path.stem for path in lessons()]


@pytest.mark.parametrize(
    ("names", "params", "message"),
    [
        (["99"], {}, "there is no lesson '99'; there are: 00_start_here, 01_track_a_run"),
        (["01"], {"epoch": 3}, "no chosen lesson has a parameter 'epoch'; they have: train_images, epochs"),
        (["00"], {"epochs": 3}, "no chosen lesson has a parameter 'epochs'; they have: train_images, seed"),
        (["01"], {"epochs": "many"}, "parameter epochs = 'many' must be of type int"),
        (["01"], {"epochs": 2.5}, "parameter epochs = 2.5 must be of type int"),
        (["01"], {"flip": "perhaps"}, "parameter flip = 'perhaps' must be of type bool"),
        (["01"], {"device": 3}, "parameter device = 3 must be of type str"),
    ],
)
def test_bad_names_and_values_are_refused_before_anything_runs(names, params, message, tmp_path):
    with pytest.raises(DemoError, match=message.replace("(", r"\(")):
        plan(names, params, tmp_path / "build")
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("text", ["{", "{}", "not JSON"])
def test_a_file_that_is_no_notebook_is_named(tmp_path, text):
    (tmp_path / "broken.ipynb").write_text(text)
    with pytest.raises(DemoError, match=r"broken\.ipynb is no notebook"):
        plan([str(tmp_path / "broken.ipynb")], {}, tmp_path / "build")


def test_each_lesson_gets_its_own_parameters_with_their_types(tmp_path):
    first, second = plan(["00", "01"], {"train_images": "500", "learning_rate": "1e-3", "flip": "true"}, tmp_path)
    assert first.params == {"train_images": 500}
    assert second.params == {"train_images": 500, "learning_rate": 0.001, "flip": True}


def test_results_are_tracked_and_a_failure_keeps_the_others(home, notebook, tmp_path):
    good = notebook("good", "number: int = 1", "print('the number is', number)")
    bad = notebook("bad", "number: int = 1", "text = 'fine'", "raise ValueError('no such shirt')")
    jobs = plan([good, bad], {"number": "7"}, tmp_path / "build")
    batch.run(jobs)
    assert [job.status for job in jobs] == ["FINISHED", "FAILED"]
    parent, children = runs_of_batch()
    assert parent.info.status == "FAILED" and parent.data.metrics["failed_lessons"] == 1
    assert {name: run.info.status for name, run in children.items()} == {"good": "FINISHED", "bad": "FAILED"}
    assert all(run.data.params == {"number": "7"} for run in children.values())
    assert all(run.data.metrics["seconds"] > 0 for run in children.values())
    assert "ValueError: no such shirt" in children["bad"].data.tags["error"]
    for name, run in children.items():
        path = mlflow.artifacts.download_artifacts(f"{run.info.artifact_uri}/{name}.ipynb")
        assert nbformat.read(path, 4).metadata.papermill.parameters == {"number": 7}
        assert (tmp_path / "build" / f"{name}.html").stat().st_size > 10_000
    assert "the number is 7" in (tmp_path / "build" / "good.html").read_text()
    assert "cell [4] failed with ValueError: no such shirt" in table(jobs)


def test_a_page_has_the_cells_words_for_its_figure_and_the_end_of_a_progress_bar(home, notebook, tmp_path):
    draw = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 2]);"
    bar = "import sys\nfrom tqdm import tqdm\nfor _ in tqdm(range(3), file=sys.stdout, mininterval=0): pass"
    path = notebook("page", "number: int = 1", draw, bar)
    made = nbformat.read(path, 4)
    made.cells[1].metadata["alt"] = 'A line from 1 to 2, "rising" & <bold>.'
    made.cells.insert(2, new_code_cell("plt.plot([2, 1]);", metadata={"alt": "A falling line."}))
    nbformat.write(made, path)
    jobs = plan([path], {}, tmp_path / "build")
    batch.run(jobs)
    assert not jobs[0].error
    page = BeautifulSoup(jobs[0].output.with_suffix(".html").read_text(), "html.parser")
    assert [image["alt"] for image in page.find_all("img")] == [made.cells[1].metadata.alt, "A falling line."]
    (shown,) = nbformat.read(jobs[0].output, 4).cells[-1].outputs
    assert re.fullmatch(r"100%\|[^\r\n]*3/3[^\r\n]*\n", shown.text)
    assert shown.text.strip() in page.get_text()


def test_a_killed_kernel_fails_and_its_run_does_not_stay_running(home, notebook, tmp_path):
    code = (
        "import os, signal, mlflow\nfrom demo_lib import store, tracking\nstore.connect('dies')\n"
        "mlflow.start_run(tags=tracking.provenance())\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    good = notebook("good", "number: int = 1")
    jobs = plan([notebook("dies", "number: int = 1", code), good], {}, tmp_path / "build")
    batch.run(jobs)
    assert [job.status for job in jobs] == ["FAILED", "FINISHED"]
    assert "Kernel died" in jobs[0].error
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("dies").experiment_id])
    assert run.info.status == "KILLED"
    assert run.data.tags["batch_id"] == runs_of_batch()[0].data.tags["batch_id"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_everything_killed_and_keeps_what_was_done(home, notebook, tmp_path, signum):
    slow = (
        "import time, mlflow\nfrom demo_lib import store, tracking\nstore.connect('slow')\n"
        "with mlflow.start_run(tags=tracking.provenance()), tracking.truthful_status():\n"
        f"    open({str(tmp_path / 'started')!r}, 'w').close()\n    time.sleep(120)"
    )
    names = [
        notebook("done", "number: int = 1"),
        notebook("slow", "number: int = 1", slow, "number = 2"),
        notebook("waiting", "number: int = 1"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "demo_lib", "run", *names, "--jobs", "1", "--output", str(tmp_path / "build")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
        preexec_fn=normal_signals,
    )
    patience = time.monotonic() + 120
    while not (tmp_path / "started").exists() and time.monotonic() < patience:
        time.sleep(0.1)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if signum == signal.SIGINT else -signal.SIGTERM), errors
    mlflow.set_tracking_uri(f"sqlite:///{home}/store/mlflow.db")
    parent, children = runs_of_batch()
    assert parent.info.status == "KILLED"
    assert {name: run.info.status for name, run in children.items()} == {"done": "FINISHED", "slow": "KILLED"}
    (run,) = mlflow.search_runs(experiment_names=["slow"], output_format="list")
    assert run.info.status == "KILLED"
    assert nbformat.read(tmp_path / "build" / "done.ipynb", 4).metadata.papermill.exception is None
    if signum == signal.SIGINT:
        assert errors.strip() == "interrupted."
        for line in (r"done +FINISHED", r"slow +KILLED", r"waiting +NOT RUN"):
            assert re.search(f"^{line}", output, re.MULTILINE), output


def test_a_full_disk_does_not_replace_a_good_notebook(home, notebook, tmp_path, monkeypatch):
    jobs = plan([notebook("good", "number: int = 1")], {"number": 1}, tmp_path / "build")
    batch.run(jobs)
    before = jobs[0].output.read_bytes()

    def full(notebook, path, *args, **kwargs):
        Path(path).write_text('{"cel')
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pm.engines, "write_ipynb", full)
    again = plan([notebook("good", "number: int = 1")], {"number": 2}, tmp_path / "build")
    batch.run(again)
    assert again[0].status == "FAILED" and "No space left on device" in again[0].error
    assert again[0].output.read_bytes() == before


@pytest.mark.parametrize(("chosen", "threads"), [(None, 3), ("", 3), ("5", 5)])
def test_cores_are_shared_out_unless_the_user_has_chosen(home, notebook, tmp_path, monkeypatch, chosen, threads):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    show = "import os; print('threads', os.environ['OMP_NUM_THREADS'])"
    jobs = plan([notebook(name, "number: int = 1", show) for name in "ab"], {}, tmp_path / "build")
    batch.run(jobs, workers=2)
    assert all(f"threads {threads}" in job.output.read_text() for job in jobs)


def test_a_batch_overwrites_no_notebook_and_keeps_those_of_one_name_apart(notebook, tmp_path):
    one, other = notebook("same", "number: int = 1"), tmp_path / "other" / "Same.ipynb"
    other.parent.mkdir()
    other.write_bytes(Path(one).read_bytes())
    with pytest.raises(DemoError, match=r"same\.ipynb would be overwritten: choose another --output"):
        plan([one], {}, tmp_path)
    with pytest.raises(DemoError, match=r"00_start_here\.ipynb would be overwritten"):
        plan(["00"], {}, ROOT / "tests" / ".." / "notebooks")
    with pytest.raises(DemoError, match=r"two of the notebooks are called same\.ipynb"):
        plan([one, str(other)], {}, tmp_path / "build")


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), [1.0, float("inf")], datetime.date(2030, 1, 31)])
def test_what_a_notebook_cannot_hold_is_refused(notebook, tmp_path, value):
    made = notebook("values", "rate: float = 0.1\nmany = None")
    for name in ("rate", "many") if not isinstance(value, str) else ("rate",):
        with pytest.raises(DemoError, match=rf"parameter {name} = .* must be of type (float, not nan|text, number)"):
            plan([made], {name: value}, tmp_path / "build")


def test_two_batches_into_one_folder_each_record_their_own_notebooks(home, notebook, tmp_path):
    made = [notebook(name, "number: int = 1", "import time; time.sleep(0.5); print('number', number)") for name in "ab"]
    command = [sys.executable, "-m", "demo_lib", "run", *made, "--output", str(tmp_path / "build"), "-p", "number"]
    running = [subprocess.Popen([*command, number], stdout=subprocess.DEVNULL) for number in "12"]
    assert [process.wait(120) for process in running] == [0, 0]
    client = MlflowClient(f"sqlite:///{home}/store/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("batch").experiment_id])
    lessons = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(lessons) == 4
    for run in lessons:
        text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{run.info.run_name}.ipynb")
        assert f"number {run.data.params['number']}\\n" in text


def test_a_kernel_of_another_python_by_the_same_name_is_not_taken(home, notebook, tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/no/python", "{connection_file}"], "display_name": "other", "language": "python"}')
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    (job,) = plan([notebook("own", "number: int = 1", "import sys; print(sys.executable)")], {}, tmp_path / "build")
    batch.run([job])
    assert job.status == "FINISHED" and sys.executable in job.output.read_text()


def test_a_kernel_that_ends_at_once_gives_its_reason(home, notebook, tmp_path, monkeypatch, recwarn):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ipykernel_launcher.py").write_text("raise SystemExit('no kernel today')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    (job,) = plan([notebook("own", "number: int = 1")], {}, tmp_path / "build")
    (tmp_path / "build").mkdir()
    for suffix in (".ipynb", ".html"):
        job.output.with_suffix(suffix).write_text("of an earlier batch")
    batch.run([job])
    assert job.status == "FAILED"
    assert {path.read_text() for path in (tmp_path / "build").iterdir()} == {"of an earlier batch"}
    assert job.error.startswith("RuntimeError: Kernel died") and job.error.endswith("last line: no kernel today")
    parent, children = runs_of_batch()
    assert children["own"].data.tags["error"] == job.error and parent.info.status == "FAILED"
