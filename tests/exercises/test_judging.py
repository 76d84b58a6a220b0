"""The four answers, near misses, what a check does to the store and how its reply is shown."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import Mock

from demo_lib.__main__ import main
from demo_lib.exercises import EXERCISES, check, check_all, progress, quiz, solution
from demo_lib.exercises.judging import counted, listed
from demo_lib.store import connect

import mlflow
import pytest
from mlflow import MlflowClient, MlflowException

from tests.exercises.lesson_00 import MEANS, TEN, seed_run
from tests.exercises.makeshift import log_model, register


@pytest.fixture
def tried(home):
    """The store with two of the three runs of exercise 00.1."""
    connect("exercises")
    seed_run(0)
    seed_run(1)
    return home


def test_a_check_makes_no_store(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO_HOME", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    assert {check(number).answer for number in EXERCISES} == {"not attempted"}
    assert check("00.1").answer == "not attempted" and set(progress().answer) == {"not attempted"}
    assert quiz("01").text and not list(tmp_path.iterdir())


def test_a_check_changes_nothing(tried):
    def dump():
        with sqlite3.connect(tried / "store" / "mlflow.db") as connection:
            return list(connection.iterdump())

    before = dump()
    for number in EXERCISES:
        check(number)
    progress()
    assert dump() == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root can become another user")
def test_another_user_who_may_only_read_can_check(tried, monkeypatch):
    code = "import os, sys, demo_lib.exercises; from demo_lib.__main__ import main; main(['check', '00.1']); "
    code += "os.setuid(65534); sys.exit(main(['check', '00.1']))"
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are root's only
        shutil.copytree(tried / "store", Path(folder, "store"))
        Path(folder).chmod(0o755)
        monkeypatch.setenv("DEMO_HOME", folder)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if "good run for seed 0 and 1, none for 2" in line]
    assert len(said) == 2, done.stdout + done.stderr


def test_a_check_takes_less_than_a_second(tried):
    check("00.1")
    started = time.perf_counter()
    for number in EXERCISES:
        check(number)
    assert time.perf_counter() - started < len(EXERCISES)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:9", "no MLflow server answers"),
        ("sqlite:////usr", "can't be used"),
        ("ftp://example.org", "is no store"),
    ],
)
def test_a_store_that_does_not_answer_can_not_tell(uri, reason, home, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    reply = check("00.1")
    assert reply.answer == "can't tell" and reason in reply.text
    assert set(progress().answer) == {"can't tell"} and quiz("01").text


def test_a_broken_database_can_not_tell(tried):
    for path in (tried / "store").glob("mlflow.db*"):
        path.write_bytes(b"no database at all" * 100)
    assert check("00.1").answer == "can't tell"


def test_near_misses_are_named(home):
    connect("another")
    client = MlflowClient()
    seed_run(0)
    assert 'in the experiment `another`: call `connect("exercises")` first' in check("00.1").text
    connect("exercises")
    seed_run(1)
    client.delete_run(mlflow.search_runs(output_format="list")[0].info.run_id)
    for run in mlflow.search_runs(experiment_names=["another"], output_format="list"):
        client.delete_run(run.info.run_id)
    assert "which has it, is deleted" in check("00.1").text
    with mlflow.start_run(tags={"Exercise": "0.2"}):
        pass
    assert "has the tag `Exercise = 0.2`: write it as `exercise = 00.2`" in check("00.2").text
    with mlflow.start_run() as run:
        pass
    said = check("01.1").text
    assert "began lately" not in check_all(["01.1", "01.2"])[0].text
    assert "began lately and has no tag" in said and f'set_tag("{run.info.run_id}", "exercise", "01.1")' in said
    client.delete_experiment(run.info.experiment_id)
    assert "is deleted" in check("01.1").text


def test_the_closest_of_several_attempts_is_spoken_of(home):
    connect("exercises")
    with mlflow.start_run(tags=TEN, run_name="near"):
        for mean in MEANS:
            mlflow.log_metric("mean_pixel", mean)
    with mlflow.start_run(tags=TEN, run_name="far"):
        pass
    text = check("00.2").text
    assert text.startswith("Of 2 attempts this is the closest. Run `near`") and "all at step 0" in text


def test_odd_things_in_an_attempt_are_no_error(home):
    connect("exercises")
    for number in EXERCISES:
        with mlflow.start_run(tags={"exercise": number, "copied_from": "x", "best_run_id": "", "repeats": "no id"}):
            mlflow.log_params({"seed": "ten", "steps_per_epoch": "", "number": "-1", "channels": "many"})
            for name in ("val_loss", "val_accuracy", "mean_pixel", "test_accuracy"):
                for step in (-1, 0, 0):
                    mlflow.log_metric(name, float("nan"), step=step)
    for number in EXERCISES:
        reply = check(number)
        assert reply.answer in ("not yet", "not attempted"), str(reply)
        assert "can't be read" not in reply.text, str(reply)


def test_what_one_attempt_holds_keeps_no_other_exercise_from_being_judged(tried):
    with mlflow.start_run(tags={"exercise": "06.1", "setup": "06.1"}) as run:
        mlflow.log_text("", "a.txt")
        register("scorer", log_model("classifier"), "previous")
    Path(run.info.artifact_uri.removeprefix("file://"), "predictions.json").write_text("ü", "utf-16")
    for tags in ({"exercise": "9" * 5000}, {"exercise": "00.2", "hunt_made": "9" * 5000}):
        with mlflow.start_run(tags=tags):
            pass
    answers = progress().answer
    assert answers["00.1"] == answers["00.2"] == answers["06.1"] == "not yet"
    assert "has no rows that can be read in `predictions.json`" in check("06.1").text
    assert check("02.1").answer == "not attempted"


def test_a_server_that_goes_away_meanwhile_is_asked_no_further(tried, monkeypatch):
    asked = Mock(side_effect=MlflowException("API request failed: Max retries exceeded"))
    monkeypatch.setattr("demo_lib.exercises.evidence.Evidence.search", asked)
    monkeypatch.setattr(MlflowClient, "search_experiments", asked)
    assert set(progress().answer) == {"can't tell"} and asked.call_count == 2


def test_an_exercise_that_can_not_be_read_is_told_of_alone(tried, monkeypatch):
    monkeypatch.setattr("demo_lib.exercises.evidence.Evidence.search_versions", Mock(side_effect=OSError("no disk")))
    answers = progress().answer
    assert answers["05.1"] == "can't tell" and answers["00.1"] == "not yet"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_terminal_without_a_names_signs_shows_the_reply(home, cli, encoding):
    connect("exercises")
    with mlflow.start_run(run_name="\U0001f98a \x1b[31mfox", tags={"exercise": "00.1"}):
        pass
    done = cli("check", "00.1", PYTHONIOENCODING=encoding)
    assert done.returncode == 1 and "[31mfox" in done.stdout and "\x1b" not in done.stdout and not done.stderr


def test_a_reply_is_words_and_a_mark(tried):
    reply = check("00.1")
    html, text = reply._repr_html_(), str(reply)
    assert "alert-warning" in html and "not yet" in html and "<a href=" in html and "<code>" not in text
    assert text.startswith("[~] 00.1 not yet: ") and text.isascii() and max(map(len, text.splitlines()[:-1])) <= 96
    with mlflow.start_run(tags={"exercise": "00.2"}, run_name="<script>alert(1)</script>"):
        pass
    assert "<script>" not in check("00.2")._repr_html_()


def test_the_solution_waits_until_the_exercise_is_passed(tried):
    assert "is not yet" in solution("00.1").text and "mlflow.start_run" not in solution("00.1").text
    assert "mlflow.start_run" in solution("00.1", show=True).text
    seed_run(2)
    assert "mlflow.start_run" in solution("00.1").text


def test_the_command_says_by_its_exit_code_whether_all_are_passed(tried, capsys):
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert all(number in out for number in EXERCISES) and "[~] 00.1 not yet" in out and "[ ]" not in out
    seed_run(2)
    assert main(["check", "00.1"]) == 0 and "[x] 00.1 passed" in capsys.readouterr().out
    assert main(["check", "00"]) == 1 and "01.1" not in capsys.readouterr().out
    for bad in ("1", "00.9", "two", ""):
        assert main(["check", bad]) == 2
        assert re.match(
            rf"error: there is no exercise {bad!r}(; t|: do you mean '00.2'\? T)here are 00.1, ",
            capsys.readouterr().err,
        )


def test_progress_has_the_answers(tried):
    table = progress()
    assert table.answer["00.1"] == "not yet" and table.answer["00.2"] == "not attempted"
    seed_run(2)
    assert progress().answer["00.1"] == "passed"


def test_words_of_lists_and_counts():
    assert listed([]) == "none" and listed(["a"]) == "a" and listed([1, 2.34567, "c"]) == "1, 2.346 and c"
    assert listed(range(20)) == "0, 1, 2, 3, 4, 5, 6 and 13 more"
    assert [counted(number, "child", "children") for number in (0, 1, 2)] == ["no children", "1 child", "2 children"]
