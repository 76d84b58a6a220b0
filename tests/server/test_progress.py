"""The progress table tells who ran what by who may write where, not by what the runs say."""

import time
from types import SimpleNamespace

from demo_lib.config import lessons

import pandas as pd
import pytest
from mlflow import MlflowClient

from server.__main__ import main
from server.client import as_admin
from server.participants import add, remove
from server.progress import progress

pytestmark = pytest.mark.xdist_group("server")
LESSON = "04_package_a_model"


def record(experiment, *statuses, user=None):
    client = MlflowClient()
    number = client.get_experiment_by_name(experiment).experiment_id
    for status in statuses:
        run = client.create_run(number, tags={"mlflow.user": user} if user else None)
        if status != "RUNNING":
            client.set_terminated(run.info.run_id, status)


@pytest.fixture(scope="module")
def pair(workshop):
    """Two new participants' passwords by name."""
    passwords = {}
    add(workshop.settings, ["pia", "quinn"], passwords.update)
    yield passwords
    for name in passwords:
        remove(workshop.settings, name)


def test_finished_runs_are_counted_by_person_and_lesson(workshop, pair, login, monkeypatch):
    monkeypatch.setattr("mlflow.tracking.fluent.NUM_RUNS_PER_PAGE_PANDAS", 2)
    login("pia", pair["pia"])
    record(f"pia/{LESSON}", "FINISHED", "FINISHED", "FAILED", "FINISHED", "RUNNING")
    record("pia/train", "FINISHED")
    table = progress(workshop.settings)
    assert table.loc["pia", LESSON] == 3 and table.loc["pia"].drop(["failed", "last_activity"]).sum() == 3
    assert table.failed[["pia", "quinn"]].tolist() == [1, 0]
    assert pd.Timestamp.now("UTC") - table.loc["pia", "last_activity"] < pd.Timedelta(minutes=5)
    assert table.loc["quinn"].drop("last_activity").sum() == 0 and pd.isna(table.loc["quinn", "last_activity"])
    assert "admin" not in table.index


def test_runs_that_failed_were_killed_or_are_left_are_told_from_absence(workshop, pair, login):
    login("quinn", pair["quinn"])
    before = progress(workshop.settings).loc["quinn"]
    record("quinn/05_register_and_promote", "FAILED", "KILLED", "RUNNING")
    number = (client := MlflowClient()).get_experiment_by_name("quinn/05_register_and_promote").experiment_id
    client.create_run(number, start_time=int(1000 * time.time()) - 2 * 3600_000)
    pruned = client.create_run(number, tags={"trial_state": "PRUNED"})
    client.set_terminated(pruned.info.run_id, "KILLED")
    after = progress(workshop.settings).loc["quinn"]
    assert after["failed"] == before["failed"] + 3
    assert after.drop(["failed", "last_activity"]).equals(before.drop(["failed", "last_activity"]))


def test_a_forged_user_changes_nothing(workshop, pair, login):
    login("quinn", pair["quinn"])
    before = progress(workshop.settings)
    record(f"quinn/{LESSON}", "FINISHED", user="pia")
    after = progress(workshop.settings)
    assert after.loc["pia"].equals(before.loc["pia"])
    assert after.loc["quinn", LESSON] == before.loc["quinn", LESSON] + 1


def test_an_experiment_named_like_anothers_counts_for_nobody(workshop, pair, login):
    with as_admin(workshop.settings):
        client = MlflowClient()
        theirs = client.get_experiment_by_name("pia/07_run_a_project").experiment_id
        client.rename_experiment(theirs, "aside")
    login("quinn", pair["quinn"])
    client = MlflowClient()
    number = client.create_experiment("pia/07_run_a_project")
    record("pia/07_run_a_project", "FINISHED")
    assert progress(workshop.settings)["07_run_a_project"].loc[["pia", "quinn"]].tolist() == [0, 0]
    with as_admin(workshop.settings):
        client = MlflowClient()
        client.rename_experiment(number, "taken away")
        client.rename_experiment(theirs, "pia/07_run_a_project")


def test_the_command_prints_the_table(workshop, pair, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_DEMO_SERVER_ADMIN_PASSWORD", workshop.admin[1])
    given = ["--profile", "workshop", "--folder", workshop.settings.folder, "--port", workshop.settings.port]
    assert main(["progress", *map(str, given)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:-2] == ["name", *(path.stem[:2] for path in lessons()), "failed"]
    assert {"pia", "quinn"} <= {line.split()[0] for line in lines} and max(map(len, lines)) <= 80


def test_long_names_fit_the_terminal_and_nobody_is_a_sentence(monkeypatch, capsys):
    named = {"n" * 24: {"1": "EDIT"}}
    info = SimpleNamespace(experiment_id="1", status="FAILED", start_time=1, end_time=None)
    run = SimpleNamespace(info=info, data=SimpleNamespace(tags={}))
    monkeypatch.setattr("server.progress.participants", lambda settings: named)
    monkeypatch.setattr("server.progress.experiments", lambda settings: {f"{'n' * 24}/{LESSON}": "1"})
    monkeypatch.setattr("server.progress.mlflow.search_runs", lambda *given, **options: [run] * 123)
    assert main(["progress"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    named.clear()
    assert main(["progress"]) == 0
    assert capsys.readouterr().out == "no participants yet.\n"
