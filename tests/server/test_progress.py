"""The progress table tells who ran and passed what by who may write where, not by what the runs say."""

import re
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

from demo_lib.config import DemoError, lessons
from demo_lib.exercises import EXERCISES
from demo_lib.ops.processes import free_port
from demo_lib.store import connect

import mlflow
import pandas as pd
import pytest
import requests
from mlflow import MlflowClient

from server.__main__ import main
from server.client import as_admin
from server.participants import add, remove
from server.progress import as_text, progress

pytestmark = pytest.mark.xdist_group("server")
LESSON = "04_package_a_model"
TITLES = [path.stem for path in lessons()]


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
    assert table.loc["pia", LESSON] == 3 and table.loc["pia", TITLES].sum() == 3
    assert table.loc["pia", ["ran", "failed", "passed", "tried"]].tolist() == [1, 1, 0, 0]
    assert pd.Timestamp.now("UTC") - table.loc["pia", "last_activity"] < pd.Timedelta(minutes=5)
    assert table.loc["pia", "idle"] < 5
    assert table.loc["quinn", [*TITLES, "ran", "failed"]].sum() == 0
    assert table.loc["quinn", ["last_activity", "idle", "stuck"]].isna().all()
    assert table.loc["quinn", "not_begun"] == len(EXERCISES)
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
    assert after[TITLES].equals(before[TITLES])


def test_a_forged_user_changes_nothing(workshop, pair, login):
    login("quinn", pair["quinn"])
    before = progress(workshop.settings)
    record(f"quinn/{LESSON}", "FINISHED", user="pia")
    after = progress(workshop.settings)
    assert after.loc["pia", TITLES].equals(before.loc["pia", TITLES])
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


def attempt(seeds, **tags):
    """Log attempts at exercise 00.1 as this person."""
    connect("exercises")
    for seed in seeds:
        with mlflow.start_run(tags={"exercise": "00.1"} | tags):
            mlflow.log_param("seed", seed)
            mlflow.log_metric("mean_pixel", 73 + seed)


def test_exercises_are_judged_in_each_persons_area_and_the_stuck_stand_on_top(workshop, pair, login):
    login("quinn", pair["quinn"])
    attempt([0, 1, 2], **{"mlflow.user": "pia"})
    login("pia", pair["pia"])
    attempt([0, 1])
    table = progress(workshop.settings)
    assert table.loc["quinn", ["00.1", "passed", "tried", "stuck_at"]].tolist() == ["passed", 1, 0, ""]
    assert table.loc["pia", ["00.1", "passed", "tried", "stuck_at"]].tolist() == ["not yet", 0, 1, "00.1"]
    assert table.loc["pia", "stuck"] < 5 and table.loc["quinn", "not_begun"] == len(EXERCISES) - 1
    assert table.index[0] == "pia"
    attempt([2])
    assert progress(workshop.settings).loc["pia", ["00.1", "passed", "tried"]].tolist() == ["passed", 1, 0]


def test_judging_changes_nothing_on_the_server(workshop, pair, login):
    def state():
        with as_admin(workshop.settings):
            numbers = [each.experiment_id for each in mlflow.search_experiments()]
            found = mlflow.search_runs(numbers, max_results=10_000, output_format="list")
        return [(run.info.run_id, run.info.status, run.info.end_time, run.data.tags) for run in found], numbers

    before = state()
    progress(workshop.settings)
    assert state() == before


def test_judging_sends_the_administrators_password_nowhere(workshop, pair, login):
    """A trace's spans, and a run's files, can be said to be anywhere by who may write the experiment."""
    heard = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.headers.get("Authorization"))
            self.send_error(404)

    login("quinn", pair["quinn"])
    place = connect("exercises").experiment_id
    with mlflow.start_run(tags={"exercise": "06.2"}) as run:
        pass
    with HTTPServer(("127.0.0.1", 0), Listener) as listener:
        Thread(target=listener.serve_forever, daemon=True).start()
        asked = {"auth": ("quinn", pair["quinn"]), "timeout": 20}
        about = {"experiment_id": place, "timestamp_ms": 1, "request_metadata": [{"key": "mlflow.sourceRun"}]}
        about["request_metadata"][0]["value"] = run.info.run_id
        traces = f"{workshop.url}/api/2.0/mlflow/traces"
        made = requests.post(traces, json=about, **asked).json()["trace_info"]["request_id"]
        there = f"mlflow-artifacts://127.0.0.1:{listener.server_port}/x"
        tags = [{"key": "mlflow.artifactLocation", "value": there}]
        answer = requests.patch(f"{traces}/{made}", json={"status": "OK", "timestamp_ms": 2, "tags": tags}, **asked)
        assert answer.ok, answer.text
        with as_admin(workshop.settings):  # the trap works: who reads the spans sends the password
            MlflowClient().search_traces(locations=[place], run_id=run.info.run_id)
        assert heard[0].startswith("Basic ")
        heard.clear()
        assert progress(workshop.settings).loc["quinn", "06.2"] == "not yet"
        listener.shutdown()
    assert not heard


def test_odd_times_and_numbers_of_one_person_break_nothing(workshop, pair, login):
    login("quinn", pair["quinn"])
    place, client = connect("exercises").experiment_id, MlflowClient()
    for start, tags in ((10**17, {}), (1, {"exercise": "00.1", "hunt_made": "9" * 400}), (2, {"exercise": "9" * 4000})):
        client.create_run(place, start, tags)
    table = progress(workshop.settings)
    assert table.loc["quinn", "00.1"] in ("passed", "not yet") and "pia" in table.index
    assert "quinn" in as_text(table)


def test_a_server_that_is_gone_is_a_sentence_at_once(workshop, as_server, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_DEMO_SERVER_PORT", str(free_port()))
    started = time.monotonic()
    assert main(["progress", "--profile", "workshop", "--folder", str(workshop.settings.folder)]) == 2
    assert "no server answers at" in capsys.readouterr().err and time.monotonic() - started < 30
    monkeypatch.setenv("MLFLOW_DEMO_SERVER_ADMIN_PASSWORD", "not the password")
    monkeypatch.setenv("MLFLOW_DEMO_SERVER_PORT", str(workshop.settings.port))
    assert main(["progress", "--profile", "workshop", "--folder", str(workshop.settings.folder)]) == 2
    assert "the administrator's password is refused" in capsys.readouterr().err


@pytest.fixture
def as_server(workshop, monkeypatch):
    """Run the command line with the workshop's settings."""
    monkeypatch.setenv("MLFLOW_DEMO_SERVER_ADMIN_PASSWORD", workshop.admin[1])
    given = ["--profile", "workshop", "--folder", workshop.settings.folder, "--port", workshop.settings.port]
    return lambda *arguments: main(["progress", *map(str, [*given, *arguments])])


def test_the_command_prints_the_table(pair, as_server, capsys):
    assert as_server() == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "passed", "tried", "not", "begun", "stuck", "at", "idle", "ran", "failed"]
    assert {"pia", "quinn"} <= {line.split()[0] for line in lines} and max(map(len, lines)) <= 80


def test_names_can_be_left_out(pair, as_server, capsys, tmp_path):
    assert as_server("--anonymous", "--csv", tmp_path / "progress.csv") == 0
    out, text = capsys.readouterr().out, (tmp_path / "progress.csv").read_text()
    for shown in (out, text):
        assert "pia" not in shown and "quinn" not in shown and "name" not in shown
    assert as_server("--csv", tmp_path / "progress.csv") == 0
    table = pd.read_csv(tmp_path / "progress.csv", index_col="name")
    assert {"pia", "quinn"} <= set(table.index) and {*TITLES, *EXERCISES, "ran", "passed", "idle"} <= set(table)


BAD = [("--watch", value) for value in ("0", "nan", "inf")]
BAD += [("--csv", value) for value in ("/nowhere/at/all.csv", "", "/", "/dev/null")]


@pytest.mark.parametrize("given", BAD)
def test_bad_input_is_a_sentence(given, pair, as_server, capsys):
    assert as_server(*given) == 2
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)


def test_watch_goes_on_while_the_server_is_away(monkeypatch, capsys):
    looks = iter([DemoError("no server answers."), pd.DataFrame(), KeyboardInterrupt()])

    def look(settings):
        found = next(looks)
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr("server.progress.progress", look)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(["progress", "--watch", "1"]) == 130
    out = capsys.readouterr().out
    assert "error: no server answers." in out and "no participants yet." in out and "\x1b" not in out


def test_long_names_fit_the_terminal():
    numbers = {"passed": [12], "tried": [10], "not_begun": [11], "ran": [9], "failed": [123]}
    table = pd.DataFrame(numbers | {"stuck_at": ["03.1"], "stuck": [123456], "idle": [123456]}, index=["n" * 24])
    lines = as_text(table).splitlines()
    assert max(map(len, lines)) <= 80 and "03.1, 85 d" in lines[1]
    assert as_text(table.assign(stuck_at=[""], idle=[pd.NA])).split()[-3:] == ["-", "9", "123"]
