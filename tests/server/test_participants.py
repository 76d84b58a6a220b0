"""Participants: accounts, their experiments and passwords, on the real workshop server."""

import re
import stat

from demo_lib.config import ROOT, DemoError, lessons
from demo_lib.store import connect

import mlflow
import pytest
import requests
from mlflow import MlflowClient, MlflowException

from server.__main__ import main
from server.client import account_client, as_admin, call
from server.participants import (
    add,
    area,
    experiments,
    participants,
    read_names,
    remove,
    reset,
    write_sheet,
)
from server.settings import ServerSettings

pytestmark = pytest.mark.xdist_group("server")


def state(site):
    """Participants with their permissions, and experiments."""
    return participants(site.settings), experiments(site.settings)


def status(site, login, route="experiments/search", **body):
    """What the server answers this person."""
    answer = requests.post(f"{site.url}/api/2.0/mlflow/{route}", json={"max_results": 1, **body}, auth=login)
    return answer.status_code


def refused(*arguments, **options):
    with pytest.raises(MlflowException) as caught:
        arguments[0](*arguments[1:], **options)
    return caught.value.get_http_status_code()


@pytest.fixture
def as_server(workshop, monkeypatch):
    """Run the command line with the workshop's settings."""
    for name, value in {
        "PROFILE": "workshop",
        "FOLDER": str(workshop.settings.folder),
        "PORT": str(workshop.settings.port),
        "ADMIN_PASSWORD": workshop.admin[1],
    }.items():
        monkeypatch.setenv(f"MLFLOW_DEMO_SERVER_{name}", value)
    return lambda *arguments: main([str(each) for each in arguments])


def test_each_person_can_edit_their_experiments_and_read_the_shared_one(workshop, people):
    known, there = state(workshop)
    for name in people:
        granted = known[name]
        own = {there[each] for each in area(name)}
        assert {number for number, each in granted.items() if each == "EDIT"} >= own and len(own) >= 11
        assert granted[there["shared/example"]] == "READ"
    assert not known["ann"].keys() & {there[each] for each in area("bob")}


def test_people_get_every_experiment_that_lessons_and_commands_use():
    files = [*(ROOT / "demo_lib").rglob("*.py"), *(ROOT / "notebooks").rglob("*.ipynb")]
    named = re.compile(r'(?:connect\(\\?|experiment: str = )"(\w+)')
    used = {each for file in files for each in named.findall(file.read_text())}
    assert {f"me/{each}" for each in used | {path.stem for path in lessons()}} == set(area("me"))


def test_adding_twice_changes_nothing_and_the_password_stays(workshop, people):
    before, handed = state(workshop), []
    assert add(workshop.settings, ["ann", "bob"], handed.append) == []
    assert state(workshop) == before and handed == []
    assert status(workshop, ("ann", people["ann"])) == 200


def test_adding_again_completes_what_a_failure_cut_off(workshop, people, monkeypatch, tmp_path):
    sheet = tmp_path / "sheet.csv"

    def keep(passwords):
        write_sheet(sheet, passwords)

    count = iter(range(9))
    with monkeypatch.context() as patched:

        def failing(*arguments, **options):
            if next(count, None) is None:
                raise DemoError("no server answers")
            return call(*arguments, **options)

        patched.setattr("server.participants.call", failing)
        with pytest.raises(DemoError, match="no server answers"):
            add(workshop.settings, ["half", "never"], keep)
    first = dict(line.split(",") for line in sheet.read_text().splitlines()[1:])
    assert status(workshop, ("half", first["half"])) == 200 and "never" not in participants(workshop.settings)
    assert add(workshop.settings, ["half", "never"], keep) == ["never"]
    final = dict(line.split(",") for line in sheet.read_text().splitlines()[1:])
    assert final["half"] == first["half"] and status(workshop, ("never", final["never"])) == 200
    known, there = state(workshop)
    for name in ("half", "never"):
        assert known[name].keys() >= {there[each] for each in area(name)}
        remove(workshop.settings, name)


def test_a_lost_permission_comes_back(workshop, people):
    before, there = state(workshop)
    lost = {"username": "bob", "resource_type": "experiment", "resource_id": there["bob/train"]}
    with as_admin(workshop.settings):
        account_client(workshop.url).revoke_user_permission(**lost)
    assert state(workshop)[0] != before
    add(workshop.settings, ["bob"], {}.update)
    assert state(workshop) == (before, there)


def test_one_can_not_read_write_or_delete_what_is_the_others(workshop, people, login):
    login("bob", people["bob"])
    experiment = connect("01_track_a_run")
    with mlflow.start_run() as run:
        mlflow.log_text("bob's", "note.txt")
    number, run_id = experiment.experiment_id, run.info.run_id
    login("ann", people["ann"])
    client = MlflowClient()
    assert refused(client.get_experiment, number) == refused(client.get_run, run_id) == 403
    assert refused(client.create_run, number) == refused(client.log_metric, run_id, "loss", 1) == 403
    assert refused(client.set_tag, run_id, "by", "ann") == refused(client.delete_run, run_id) == 403
    assert refused(client.delete_experiment, number) == refused(client.rename_experiment, number, "mine") == 403
    artifact = f"{workshop.url}/api/2.0/mlflow-artifacts/artifacts/{number}/{run_id}/artifacts/note.txt"
    for method in ("GET", "PUT", "DELETE"):
        assert requests.request(method, artifact, auth=("ann", people["ann"])).status_code == 403
    assert list(client.search_runs([number])) == []
    assert requests.get(artifact, auth=("bob", people["bob"])).text == "bob's"


def test_everyone_reads_the_shared_example_and_nobody_writes_it(workshop, people, login):
    number = experiments(workshop.settings)["shared/example"]
    for name, password in people.items():
        login(name, password)
        client = MlflowClient()
        (run,) = client.search_runs([number])
        assert run.info.run_name == "example"
        assert refused(client.set_tag, run.info.run_id, "by", name) == refused(client.create_run, number) == 403


def test_a_person_hands_out_no_rights_on_the_area_and_deletes_nothing_in_it(workshop, people, login):
    login("ann", people["ann"])
    with mlflow.start_run(experiment_id=connect("02_tune_with_nested_runs").experiment_id) as run:
        pass
    assert refused(MlflowClient().delete_run, run.info.run_id) == 403
    grant = {"username": "bob", "resource_type": "experiment", "permission": "READ"}
    answer = requests.post(
        f"{workshop.url}/api/3.0/mlflow/users/permissions/grant",
        json=grant | {"resource_id": run.info.experiment_id},
        auth=("ann", people["ann"]),
    )
    assert answer.status_code == 403


def test_the_same_lesson_has_an_experiment_of_each_persons_own(people, login):
    numbers = {}
    for name, password in people.items():
        login(name, password)
        experiment = connect("03_query_and_plot_runs")
        assert experiment.name == f"{name}/03_query_and_plot_runs"
        assert connect(experiment.name).experiment_id == experiment.experiment_id
        numbers[name] = experiment.experiment_id
    assert numbers["ann"] != numbers["bob"]


def test_the_command_line_adds_shows_resets_and_removes(workshop, people, as_server, tmp_path, capsys):
    file, sheet = tmp_path / "people.csv", tmp_path / "sheet.csv"
    file.write_text("name,email\ncarl,c@example.org\nann,\n")
    assert as_server("participants", "add", file, "--sheet", sheet) == 0
    (header, line) = sheet.read_text().splitlines()
    old = line.partition(",")[2]
    assert header == "name,password" and stat.S_IMODE(sheet.stat().st_mode) == 0o600
    assert "1 new, 1 already there" in (said := capsys.readouterr().out) and old not in said
    assert as_server("participants", "list") == 0
    assert set(capsys.readouterr().out.split()) >= {"ann", "bob", "carl"}
    sheet.write_text(f"{sheet.read_text()}dora,kept\n")
    assert as_server("participants", "reset", "carl", "--sheet", sheet) == 0
    kept = dict(line.split(",") for line in sheet.read_text().splitlines())
    assert kept.keys() == {"name", "carl", "dora"} and kept["dora"] == "kept"
    assert (new := kept["carl"]) not in "".join(capsys.readouterr())
    assert status(workshop, ("carl", old)) == 401 and status(workshop, ("carl", new)) == 200
    with as_admin(workshop.settings):
        client = MlflowClient()
        number = client.get_experiment_by_name("carl/01_track_a_run").experiment_id
        client.create_run(number)
    assert as_server("participants", "remove", "carl") == 0
    assert {status(workshop, ("carl", new), "runs/search", experiment_ids=[number]) for _ in range(8)} & {200} == set()
    assert "carl" not in participants(workshop.settings)
    with as_admin(workshop.settings):
        assert len(client.search_runs([number])) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read"),
        ("name\nJ\xf6rg\n", "can't be read"),
        ("", "needs a first line"),
        ("name\n", "needs a first line"),
        ("person\nann\n", "needs a first line"),
        ("name\nann\nbo b\n", "'bo b' is not allowed"),
        ("name,email\n,x@example.org\n", "'' is not allowed"),
        ("name\nann/01\n", "'ann/01' is not allowed"),
        ("name\nann.b\n", "'ann.b' is not allowed"),
        ("name\nann\nbob\nann\n", "'ann' is there twice"),
        ('name\n"ann\n', "can't be read"),
        ("id;name\n1\n", "'' is not allowed"),
        ("name\tid\nann\t1\n", "needs a first line"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(text, message, tmp_path):
    file = tmp_path / "people.csv"
    if text is not None:
        file.write_text(text, encoding="latin-1")
    with pytest.raises(DemoError, match=message):
        read_names(file)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbfname,display\r\nann,Ann A.\r\n bob ,\r\n",
        b"\xef\xbb\xbfdisplay;name\r\nA, Ann;ann\r\n;bob \r\n;\r\n",
        b" name \nann\n,,\n \nbob,left,over\n",
        b'"id", name\r\n"1", ann\t\r\n2,"bob "\r\n',
    ],
)
def test_a_file_from_a_spreadsheet_is_read(tmp_path, text):
    (file := tmp_path / "people.csv").write_bytes(text)
    assert read_names(file) == ["ann", "bob"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("admin", "'admin' is taken"), ("shared", "'shared' is taken"), ("eve", "belongs to 'bob'")],
)
def test_nothing_is_done_for_anyone_if_one_name_can_not_be(workshop, people, login, name, message):
    if "eve/train" not in experiments(workshop.settings):
        login("bob", people["bob"])
        mlflow.create_experiment("eve/train")
    before, handed = state(workshop), []
    with pytest.raises(DemoError, match=message):
        add(workshop.settings, ["new", name], handed.append)
    assert state(workshop) == before and handed == []


def test_a_sheet_that_can_not_be_written_stops_before_the_first_account(workshop, tmp_path):
    (wrong := tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    for path in (tmp_path / "none" / "sheet.csv", tmp_path, wrong):
        with pytest.raises(DemoError, match=r"the sheet .* (can't be written|has other columns than name and)"):
            add(workshop.settings, ["new"], lambda given, path=path: write_sheet(path, given))
    assert wrong.read_text() == "a,b\n1,2\n" and "new" not in participants(workshop.settings)


def test_only_participants_can_be_reset_and_removed(workshop, people):
    handed = []
    for action in (lambda *given: reset(*given, handed.append), remove):
        for name in ("nobody", "admin"):
            with pytest.raises(DemoError, match=f"no participant '{name}'; there are: .*ann.*bob"):
                action(workshop.settings, name)
    assert handed == []


def test_the_wrong_password_and_the_wrong_profile_are_said(workshop, as_server, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_DEMO_SERVER_ADMIN_PASSWORD", "not the password")
    assert as_server("participants", "list") == 2
    assert "administrator's password is refused" in capsys.readouterr().err
    with pytest.raises(DemoError, match="local has no accounts"):
        participants(ServerSettings(profile="local"))
