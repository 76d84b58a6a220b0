"""A store that is there but can't be used is one sentence; one that was moved goes on."""

import os
import shutil
import socket
import sqlite3
from contextlib import closing

from demo_lib.config import DemoError, TuneConfig, sqlite_uri, without_login
from demo_lib.databases import SECONDS, has_mlflow
from demo_lib.runs import find_run
from demo_lib.store import connect, open_store
from demo_lib.study import open_study

import mlflow
import optuna
import pytest
from mlflow import MlflowClient


def change(database, statement):
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(statement)


@pytest.mark.parametrize("version", ["451aebb31d03", "a_version_of_the_future"])
def test_tables_of_another_mlflow_are_named_with_the_command(home, version):
    change(home / "store" / "mlflow.db", f"UPDATE alembic_version SET version_num = '{version}'")
    with pytest.raises(DemoError, match=rf"tables of another MLflow \(version {version}, .*`mlflow db upgrade`"):
        connect("anything")


def test_a_database_of_others_is_refused_and_left_as_it_is(home, monkeypatch):
    optuna, other = home / "store" / "optuna.db", home / "other.db"
    open_study(TuneConfig())
    change(other, "CREATE TABLE notes (text)")
    for database, table in {optuna: "alembic_version", other: "notes"}.items():
        before = database.read_bytes()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(database))
        with pytest.raises(DemoError, match=rf"is not MLflow's \(it has a table {table}\): give MLflow one of its own"):
            open_store()
        assert database.read_bytes() == before


@pytest.mark.parametrize("spelling", ["sqlite:///{}", "sqlite+pysqlite:///{}", "sqlite:///{}/../mlflow.db"])
def test_optuna_is_kept_out_of_mlflows_database_in_any_spelling(home, spelling):
    (home / "store" / "mlflow.db").rename(home / "mlflow.db")
    (home / "link.db").symlink_to("mlflow.db")
    for name in ("mlflow.db", "link.db"):
        with pytest.raises(DemoError, match="is MLflow's database: give Optuna one of its own"):
            open_study(TuneConfig(), spelling.format(home / name).replace(f"{name}/..", "store/.."))


@pytest.mark.timeout(8 * SECONDS)  # MLflow alone tries for two minutes
def test_a_database_that_does_not_answer_is_one_sentence_without_its_password():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"postgresql://me:secret@127.0.0.1:{silent.getsockname()[1]}/mlflow"
        with pytest.raises(DemoError, match=r"the database postgresql://127\.0\.0\.1:.* can't be used") as caught:
            has_mlflow(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["postgresql://u:se/cret@h/d", "http://u:se@cret@h/d", "postgresql://h/d?user=u&password=secret&x=1"]
)
def test_no_password_is_shown(address):
    assert "cret" not in without_login(address) and "h/d" in without_login(address)


def log(experiment):
    connect(experiment)
    with mlflow.start_run() as run:
        mlflow.log_text("text", "a.txt")
    return run.info.run_id


def read(run_id):
    return mlflow.artifacts.load_text(f"{mlflow.get_run(run_id).info.artifact_uri}/a.txt")


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """Make a home at `old` with one run, move or copy it to `new` as the test says, and use it there."""

    def move(how):
        monkeypatch.setenv("DEMO_HOME", str(tmp_path / "old"))
        run_id = log("before")
        how(tmp_path / "old", tmp_path / "new")
        monkeypatch.delenv("MLFLOW_TRACKING_URI")  # MLflow sets it
        monkeypatch.setenv("DEMO_HOME", str(tmp_path / "new"))
        return run_id

    return move


def test_a_store_that_was_moved_finds_its_files_and_writes_beside_itself(moved, tmp_path):
    run_id = moved(lambda old, new: old.rename(new))
    later = log("before")
    assert read(run_id) == read(later) == "text"
    assert not (tmp_path / "old").exists()
    assert len(list((tmp_path / "new").rglob("a.txt"))) == 2


def test_a_copied_store_leaves_the_first_one_alone(moved, tmp_path):
    run_id = moved(shutil.copytree)
    log("before")
    shutil.rmtree(tmp_path / "old" / "store" / "artifacts" / "before")
    assert read(run_id) == "text"


def test_a_database_that_was_moved_without_its_files_still_finds_them(moved, tmp_path):
    def move(old, new):
        (new / "store").mkdir(parents=True)
        (old / "store" / "mlflow.db").rename(new / "store" / "mlflow.db")

    run_id = moved(move)
    open_store()
    assert read(run_id) == "text"


def test_two_names_of_one_folder_change_nothing(moved, tmp_path):
    run_id = moved(lambda old, new: new.symlink_to(old))
    open_store()
    assert MlflowClient().get_run(run_id).info.artifact_uri.startswith((tmp_path / "old").as_uri())


def test_an_empty_file_becomes_a_store(home):
    (home / "store" / "mlflow.db").write_bytes(b"")
    assert log("anything")


@pytest.mark.parametrize("closed", ["store/mlflow.db", "store", "store/artifacts"])
def test_a_store_that_others_made_is_read_and_not_written(home, monkeypatch, closed):
    run_id = log("anything")
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and str(path) != str(home / closed))
    open_store()
    assert find_run(run_id)
    with pytest.raises(DemoError, match=rf"you may not write to {home / closed}: make it yours"):
        connect("anything")


@pytest.mark.parametrize("address", ["sqlite:///:memory:", "sqlite://", "sqlite:///"])
def test_a_database_in_memory_is_no_storage(home, address):
    with pytest.raises(DemoError, match=r"name a file"):
        open_study(TuneConfig(), address)


def test_an_address_may_begin_at_home(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///~/mine.db")
    assert open_store() == sqlite_uri(home / "mine.db") and (home / "mine.db").exists()


@pytest.mark.parametrize("name", ["two\nlines", "\udcfc"])  # the second is ü where the locale has none
def test_a_path_that_cannot_be_shown_is_refused(home, name):
    with pytest.raises(DemoError, match=r"has signs that can't be used: rename the folder or") as caught:
        sqlite_uri(home / name / "mlflow.db")
    str(caught.value).encode()


def test_a_study_that_others_made_is_left_alone(home):
    address = sqlite_uri(home / "mine.db")
    for name, direction in (("down", "minimize"), ("up", "maximize")):
        other = optuna.create_study(storage=address, study_name=name, direction=direction)
        if name == "up":
            other.add_trial(optuna.trial.create_trial(value=1.0))
        with pytest.raises(DemoError, match=rf"the study '{name}' in this storage was not made here: give yours"):
            open_study(TuneConfig(study=name), address)
