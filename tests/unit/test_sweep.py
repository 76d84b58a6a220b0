"""A sweep: one lesson with many sets of parameters, checked before anything starts, named by what differs."""

import csv
import json
import re

from demo_lib.config import DemoError
from demo_lib.ops.jobs import plan, read_sets, sweep

import mlflow
import nbformat
import pytest

from tests.tools.batches import runs_of_batch


@pytest.fixture
def planned(tmp_path):
    """Plan a sweep of lesson 01 over the sets that the YAML text holds."""

    def make(text, names=("01",), **common):
        (tmp_path / "sets.yaml").write_text(text)
        return sweep(names, read_sets(tmp_path / "sets.yaml"), common, tmp_path / "build")

    return make


def test_a_list_has_one_job_a_set_named_by_what_differs(planned, tmp_path):
    jobs = planned("- {epochs: 2, seed: 5}\n- {epochs: '3', flip: yes, seed: 5}\n- seed: 5", device="cpu", epochs=9)
    assert [job.params for job in jobs] == [
        {"device": "cpu", "epochs": 2, "seed": 5},
        {"device": "cpu", "epochs": 3, "seed": 5, "flip": True},
        {"device": "cpu", "epochs": 9, "seed": 5},
    ]
    names = ["01_track_a_run epochs=2", "01_track_a_run epochs=3 flip=True", "01_track_a_run epochs=9"]
    assert [job.name for job in jobs] == names
    assert [job.output for job in jobs] == [tmp_path / "build" / name / "01_track_a_run.ipynb" for name in names]


def test_lists_of_values_have_one_job_a_combination(planned):
    jobs = planned("epochs: [2, 3]\nlearning_rate: [0.01, 1.0e-5]\nseed: [1]")
    tails = ["epochs=2 learning_rate=0.01", "epochs=2 learning_rate=1e-05"]
    tails += ["epochs=3 learning_rate=0.01", "epochs=3 learning_rate=1e-05"]
    assert [job.name for job in jobs] == [f"01_track_a_run {tail}" for tail in tails]
    assert all(job.params["seed"] == 1 for job in jobs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- epochs: 2\n- epochs: many", "set 2 of the sweep: parameter epochs = 'many' must be of type int"),
        ("- epochs: 2\n- epoch: 3", "set 2 of the sweep: no chosen lesson has a parameter 'epoch'; they have: train"),
        ("- epochs: 2\n- epochs: '2'", "sets 1 and 2 of the sweep are equal: leave one out"),
        ("epochs: [2, 2.0]", "sets 1 and 2 of the sweep are equal: leave one out"),
        ("- epochs: 2\n- 3", "set 2 of .*sets.yaml must be a mapping, as `- epochs: 2`"),
        ("epochs: 2", r"must give a list of values for epochs, as `epochs: \[1, 2\]`"),
        ("epochs: []", "must give a list of values for epochs"),
        ("", "must hold a list of sets, or a list of values for each parameter: from 1 to 10,000 sets"),
        ("[]", "must hold a list of sets"),
        ("just text", "must hold a list of sets"),
        ("epochs: &many [0,1,2,3,4,5,6,7,8,9]\n" + "".join(f"p{i}: *many\n" for i in range(40)), "to 10,000 sets"),
        ("epochs: [2", "can't be read as YAML"),
        ("1: [2]", "set 1 of the sweep: no chosen lesson has a parameter 1"),
    ],
)
def test_a_bad_set_is_named_before_anything_runs(planned, tmp_path, text, message):
    with pytest.raises(DemoError, match=message):
        planned(text)
    assert not (tmp_path / "build").exists()


def test_what_is_common_is_checked_and_only_one_lesson_can_be_swept(planned):
    with pytest.raises(DemoError, match=r"^parameter seed = 'x' must be of type int"):
        planned("epochs: [2, 3]", seed="x")
    for names in ((), ("00", "01")):
        with pytest.raises(DemoError, match=r"--sweep runs one lesson many times: name one\."):
            planned("epochs: [2, 3]", names)
    assert len(planned("epochs: [2, 3]", ("01", "01_track_a_run"))) == 2


def test_each_folder_has_a_name_that_every_system_takes_and_no_other_set_has(notebook, tmp_path):
    texts = ["a/b", "a:b", "A/B", "..", "x" * 300, "x" * 300 + "y", "line\nbreak", "ü", "ends with a dot.", "CON", ""]
    path = notebook("words", "text: str = ''")
    jobs = sweep([path], [{"text": text} for text in texts], {}, tmp_path / "build")
    folders = [job.output.parent.name for job in jobs]
    assert len({each.lower() for each in folders}) == len(texts)
    assert all(re.fullmatch(r"[\w =.,+()-]{1,110}(?<![ .])", each, re.ASCII) for each in folders)
    assert {job.output.parent.parent for job in jobs} == {tmp_path / "build"}
    assert [job.params["text"] for job in jobs] == texts


def test_a_sweep_overwrites_no_notebook(notebook, tmp_path):
    (tmp_path / "same").mkdir()
    path = notebook("same/same", "number: int = 1")
    with pytest.raises(DemoError, match=r"same\.ipynb would be overwritten: choose another --output"):
        sweep([path], [{}], {}, tmp_path)


def test_a_lesson_of_a_plain_batch_is_not_named_after_its_parameters(tmp_path):
    (job,) = plan(["01"], {"epochs": 2}, tmp_path)
    assert job.name == "01_track_a_run" and job.output == tmp_path / "01_track_a_run.ipynb"


def test_a_sweep_is_one_parent_with_a_child_a_set_and_a_table(cli, notebook, tmp_path):
    path = notebook("small", "number: int = 1\nword: str = ''", "print('seven' if number == 7 else 1 / number)")
    (tmp_path / "sets.yaml").write_text("number: [7, 0]")
    done = cli("run", path, "--sweep", tmp_path / "sets.yaml", "-p", "word", "same", "--output", tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert re.search(r"^number  status    seconds\n7 +FINISHED +\d+\.\d\n0 +FAILED +\d+\.\d$", done.stdout, re.M)
    assert "small number=0: cell [3] failed with ZeroDivisionError" in done.stdout
    parent, children = runs_of_batch()
    assert parent.info.status == "FAILED" and parent.data.metrics["failed_lessons"] == 1
    assert {name: run.info.status for name, run in children.items()} == {
        "small number=7": "FINISHED",
        "small number=0": "FAILED",
    }
    text = mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/jobs.csv")
    header, *rows = csv.reader(text.splitlines())
    assert header == ["number", "status", "seconds", "error"]
    assert [row[:2] for row in rows] == [["7", "FINISHED"], ["0", "FAILED"]] and "ZeroDivisionError" in rows[1][3]
    for name, run in children.items():
        assert run.data.tags["batch_id"] == parent.info.run_id and run.data.params["word"] == "same"
        executed = nbformat.read(tmp_path / "out" / name / "small.ipynb", 4)
        assert executed.metadata.papermill.parameters.number == int(run.data.params["number"])
        logged = {file.path for file in mlflow.artifacts.list_artifacts(run_id=run.info.run_id)}
        assert logged == {"small.ipynb", "small.html"}
    page = mlflow.artifacts.load_text(f"{children['small number=7'].info.artifact_uri}/small.html")
    assert page == (tmp_path / "out" / "small number=7" / "small.html").read_text() and "seven" in page
    assert len(json.loads(mlflow.artifacts.load_text(f"{parent.info.artifact_uri}/batch.json"))["jobs"]) == 2


def test_a_parameter_is_given_for_all_sets_or_by_the_sets(cli, notebook, tmp_path):
    path = notebook("small", "number: int = 1")
    (tmp_path / "sets.yaml").write_text("number: [7, 0]")
    done = cli("run", path, "--sweep", tmp_path / "sets.yaml", "-p", "number", "1")
    assert done.returncode == 2
    assert done.stderr.endswith("sets.yaml gives number, too: leave out -p number, or take it out of the sets.\n")
