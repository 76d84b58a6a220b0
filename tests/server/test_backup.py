"""Back up, lose everything, restore: the same rows, the same bytes, the same logins."""

import json
import shutil
import sqlite3
import threading
import uuid
from contextlib import contextmanager
from unittest.mock import Mock

from demo_lib.config import DemoError
from demo_lib.ops.processes import free_port

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from server.__main__ import main
from server.backup import _content, _hashes, _run_tool, back_up, restore
from server.client import as_admin, call, signed_in
from server.database import connect, database_address
from server.process import running
from server.settings import ServerSettings
from tests.server.conftest import make_secrets
from tests.tools.processes import wait_until

pytestmark = pytest.mark.xdist_group("server")


@contextmanager
def site(**given):
    settings = ServerSettings(port=free_port(), **given)
    with running(settings), as_admin(settings):
        yield settings


def log_run(**tags):
    with mlflow.start_run(tags=tags) as run:
        mlflow.log_params({"a": 1, "b": "two"})
        for step in range(20):
            mlflow.log_metric("loss", 1 / (1 + step), step=step)
        mlflow.log_text(f"made by {run.info.run_id}", "notes/text.txt")
    return run.info.run_id


def log_small_runs(experiment, stop):
    """Log runs of 50 metrics, and an artifact before the run ends."""
    client = MlflowClient()
    while not stop.is_set():
        run_id = client.create_run(experiment).info.run_id
        client.log_text(run_id, run_id, "text.txt")
        client.log_batch(run_id, metrics=[Metric("loss", 0.5, 0, step) for step in range(50)])
        client.set_terminated(run_id)


def history(run_id):
    return [(metric.step, metric.value) for metric in MlflowClient().get_metric_history(run_id, "loss")]


def _back_up_while_a_client_logs(settings, target):
    stop, experiment = threading.Event(), MlflowClient().create_experiment("busy")
    client = threading.Thread(target=log_small_runs, args=(experiment, stop))
    client.start()
    try:
        wait_until(lambda: len(MlflowClient().search_runs([experiment])) > 2)
        manifest = back_up(settings, target)
        logged = len(MlflowClient().search_runs([experiment]))
        wait_until(lambda: len(MlflowClient().search_runs([experiment])) > logged)  # so it logged all the while
    finally:
        stop.set()
        client.join(30)
    return manifest


@pytest.fixture(scope="module", params=["local", pytest.param("workshop", marks=pytest.mark.slow)])
def backup(request, tmp_path_factory):
    """A backup of a server that ran, with what it held."""
    folder = tmp_path_factory.mktemp(request.param)
    given = {"profile": request.param} | make_secrets()
    with site(folder=folder / "old", **given) as settings:
        mlflow.set_experiment("kept")
        run_id = log_run(place="Zürich 東京")
        known = {"history": history(run_id), "given": given, "run_id": run_id}
        if settings.accounts:
            answer = call(
                settings,
                "POST",
                "/api/2.0/mlflow/users/create",
                json={"username": "ann", "password": "ann has a password"},
            )
            assert answer.status_code == 200, answer.text
        manifest = _back_up_while_a_client_logs(settings, folder / "backup")
    shutil.rmtree(folder / "old")
    return folder / "backup", manifest, known


def test_a_restored_server_has_the_same_rows_files_and_logins(backup, tmp_path):
    source, manifest, known = backup
    settings = ServerSettings(**known["given"], folder=tmp_path / "new", port=free_port())
    assert restore(settings, source) == manifest
    filled = [path for path in settings.folder.rglob("*") if path.name != "lock" and path.parent.name != "postgres"]
    assert "text.txt" in {path.name for path in filled} and not any(path.stat().st_mode & 0o077 for path in filled)
    with running(settings), as_admin(settings):
        assert history(known["run_id"]) == known["history"]
        uri = f"runs:/{known['run_id']}/notes/text.txt"
        assert mlflow.artifacts.load_text(uri) == f"made by {known['run_id']}"
        assert mlflow.get_run(known["run_id"]).data.tags["place"] == "Zürich 東京"
        busy = mlflow.search_runs(experiment_names=["busy"])
        assert len(busy) >= 2 and len(busy) + 1 == manifest["counts"]["runs"]
        for run_id in busy[busy.status == "FINISHED"].run_id:
            assert len(history(run_id)) == 50
            assert mlflow.artifacts.load_text(f"runs:/{run_id}/text.txt") == run_id
        if settings.accounts:
            with signed_in(settings.url, "ann", "ann has a password"):
                assert MlflowClient().create_experiment("of ann")
        with pytest.raises(DemoError, match="works in"):
            restore(settings, source)
    with pytest.raises(DemoError, match="is not empty"):
        restore(settings, source)
    shutil.rmtree(settings.folder / "artifacts")
    with pytest.raises(DemoError, match=r"database is not empty"):
        restore(settings, source)
    assert not list((settings.folder / "artifacts").iterdir())


def test_the_backup_is_its_owners_only(backup):
    assert backup[0].stat().st_mode & 0o077 == 0


def test_artifacts_that_are_not_there_or_not_apart_are_refused(tmp_path):
    with pytest.raises(DemoError, match="not mounted does not exist"):
        back_up(ServerSettings(folder=tmp_path, artifacts=str(tmp_path / "not mounted")), tmp_path / "backup")
    (tmp_path / "artifacts").mkdir()
    with pytest.raises(DemoError, match="is among the artifacts"):
        back_up(ServerSettings(folder=tmp_path), tmp_path / "artifacts" / "backup")
    assert [path.name for path in tmp_path.rglob("*")] == ["artifacts"]


def test_artifacts_elsewhere_are_left_to_their_providers_tool(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_DEMO_SERVER_DATABASE", f"sqlite:///{home}/store/mlflow.db")
    (tmp_path / "folder").mkdir()
    arguments = ["--folder", str(tmp_path / "folder"), "--artifacts", "s3://bucket/place"]
    assert main(["backup", str(tmp_path / "backup"), *arguments]) == 0
    assert "Not in it: artifacts at s3://bucket/place" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "backup").iterdir()) == ["database.sqlite", "manifest.json"]


def test_the_password_goes_to_the_tools_by_the_environment(tmp_path, monkeypatch):
    tool = tmp_path / "tool"
    tool.write_text('#!/bin/sh\necho "$PGPASSWORD" >&2; echo "$@" >"$0.args"; exit 1')
    tool.chmod(0o700)
    monkeypatch.setattr("server.backup.postgres_tool", lambda name: str(tool))
    with pytest.raises(DemoError, match="hidden%"):
        _run_tool("pg_dump", ["--file=x"], "postgresql://ann:hidden%25@db.example:5433/mlflow")
    assert (tmp_path / "tool.args").read_text() == "--dbname=postgresql://ann@db.example:5433/mlflow --file=x\n"


def test_tools_without_tls_are_replaced_by_the_systems_if_it_has_some(tmp_path, monkeypatch):
    tools = {name: tmp_path / name for name in ("wheels", "systems")}
    tools["wheels"].write_text("#!/bin/sh\necho 'sslmode invalid when SSL support is not compiled in' >&2; exit 1")
    tools["systems"].write_text('#!/bin/sh\necho "$@" >"$0.args"')
    for tool in tools.values():
        tool.chmod(0o700)
    monkeypatch.setattr("server.backup.postgres_tool", lambda name: str(tools["wheels"]))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        DemoError, match=r"SSL support .*: nothing was changed; for TLS install PostgreSQL's own programs"
    ):
        _run_tool("pg_dump", ["--file=x"], "postgresql://ann@db.example/mlflow?sslmode=require")
    monkeypatch.setattr("shutil.which", lambda name: str(tools["systems"]))
    _run_tool("pg_dump", ["--file=x"], "postgresql://ann@db.example/mlflow?sslmode=require")
    assert (tmp_path / "systems.args").read_text().endswith("sslmode=require --file=x\n")


def test_a_full_disk_keeps_nothing_and_shows_no_sql(home, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DEMO_SERVER_DATABASE", f"sqlite:///{home}/store/mlflow.db")
    (tmp_path / "server" / "artifacts").mkdir(parents=True)
    full = OperationalError("VACUUM INTO ?", {}, sqlite3.OperationalError("database or disk is full"))
    monkeypatch.setattr("server.backup._dump", Mock(side_effect=full))
    with pytest.raises(DemoError, match=r"can't be filled \(database or disk is full\): nothing was kept") as caught:
        back_up(
            ServerSettings(folder=tmp_path / "server", database=f"sqlite:///{home}/store/mlflow.db"), tmp_path / "b"
        )
    assert "VACUUM" not in str(caught.value) and not (tmp_path / "b").exists()


def test_nothing_is_not_backed_up(tmp_path):
    with pytest.raises(DemoError, match="does not exist: start the server, or correct --folder"):
        back_up(ServerSettings(folder=tmp_path / "mistyped"), tmp_path / "backup")
    (tmp_path / "artifacts").mkdir()
    with pytest.raises(DemoError, match="has no tables yet"):
        back_up(ServerSettings(folder=tmp_path), tmp_path / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts"]


def test_a_backup_is_whole_or_not_there_and_over_nothing(home, tmp_path, monkeypatch):
    settings = ServerSettings(folder=home, database=f"sqlite:///{home}/store/mlflow.db", artifacts=str(home / "store"))
    (mine := tmp_path / "mine").mkdir()
    (mine / "notes").write_text("mine")
    with pytest.raises(DemoError, match="is not empty"):
        back_up(settings, mine)
    assert [path.name for path in mine.iterdir()] == ["notes"]
    with monkeypatch.context() as patch, pytest.raises(DemoError, match="No space left on device"):
        patch.setattr("server.backup._hashes", fill_the_disk)
        back_up(settings, tmp_path / "backup")
    assert not (tmp_path / "backup").exists()
    back_up(settings, tmp_path / "backup")


def fill_the_disk(*arguments):
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    "made",
    [
        "CREATE TABLE mine (a int)", "CREATE SCHEMA x; CREATE VIEW x.mine AS SELECT 1", "CREATE SEQUENCE mine",
        "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'", "CREATE TYPE mine AS ENUM ('a')",
        "CREATE TYPE mine AS (a int)", "CREATE DOMAIN mine AS int", "CREATE TYPE mine AS RANGE (subtype = int4)",
        "CREATE MATERIALIZED VIEW mine AS SELECT 1",
    ],
)  # fmt: skip
def test_a_database_that_holds_anything_is_not_restored_into(given_database, made):
    settings, source, ask = given_database
    ask(made)
    with pytest.raises(
        DemoError, match=r"is not empty \((public|x)\.mine\w*\): restore|is not MLflow's \(it has a table mine\)"
    ):
        restore(settings, source)
    assert not ask("SELECT to_regclass('runs')") and not list(settings.artifact_folder.iterdir())


def test_what_an_extension_made_is_nobodys_and_a_failed_restore_leaves_the_database_as_it_was(given_database):
    settings, source, ask = given_database
    ask("CREATE EXTENSION hstore; CREATE EXTENSION pg_stat_statements")
    assert _content(settings.address) is None
    (source / "database.postgresql").write_text("CREATE TABLE runs (a int); CREATE SCHEMA x; SELECT 1 / 0;")
    manifest = json.loads((source / "manifest.json").read_text()) | {"files": _hashes(source)}
    (source / "manifest.json").write_text(json.dumps(manifest))
    settings.artifact_folder.mkdir(parents=True)
    with pytest.raises(DemoError, match=r"psql failed \(.*division by zero\): nothing was changed"):
        restore(settings, source)
    assert _content(settings.address) is None and not ask("SELECT 1 FROM pg_namespace WHERE nspname = 'x'")
    assert settings.artifact_folder.is_dir() and not list(settings.artifact_folder.iterdir())


@pytest.fixture
def given_database(workshop, tmp_path):
    """Settings with an empty database of a PostgreSQL that is given, a backup for it, and a function to ask it."""
    address = database_address(workshop.settings, name := f"given_{uuid.uuid4().hex}")
    with connect(database_address(workshop.settings), isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    (source := tmp_path / "source" / "artifacts").mkdir(parents=True)
    (source / "text.txt").write_text("an artifact")
    (source := source.parent).joinpath("database.postgresql").write_text("CREATE TABLE runs (a int);")
    known = {"mlflow": mlflow.__version__, "database": "postgresql", "artifacts": "artifacts", "counts": {"runs": 0}}
    (source / "manifest.json").write_text(json.dumps(known | {"files": _hashes(source)}))
    given = {"database": SecretStr(address), "folder": tmp_path / "new", "profile": "workshop"}

    def ask(query):
        with connect(address, isolation_level="AUTOCOMMIT") as connection:
            answer = connection.execute(text(query))
            return answer.scalar() if answer.returns_rows else None

    return ServerSettings(**given), source, ask


def break_hash(folder):
    next((folder / "artifacts").rglob("text.txt")).write_text("other")


def lose_file(folder):
    next((folder / "artifacts").rglob("text.txt")).unlink()


def add_file(folder):
    (folder / "artifacts" / "more").write_text("x")


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


def write_another_manifest(folder):
    (folder / "manifest.json").write_text('{"files": 3}')


def change_version(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"mlflow": "2.0"}))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (break_hash, r"damaged at artifacts/.*text.txt"),
        (lose_file, r"damaged at artifacts/.*text.txt"),
        (add_file, r"has a file that is not its own, artifacts/more: delete that file"),
        (lose_manifest, r"no readable manifest.json"),
        (write_another_manifest, r"no readable manifest.json"),
        (change_version, r"is of MLflow 2.0"),
    ],
)
def test_a_bad_backup_changes_nothing(backup, tmp_path, damage, sentence):
    source, _, known = backup
    shutil.copytree(source, tmp_path / "copy")
    damage(tmp_path / "copy")
    settings = ServerSettings(**known["given"], folder=tmp_path / "new", port=free_port())
    with pytest.raises(DemoError, match=sentence):
        restore(settings, tmp_path / "copy")
    assert not list((settings.folder / "artifacts").rglob("*")) and not (settings.folder / "mlflow.db").exists()
    restore(settings, source)  # so the target was left empty


def test_a_restore_that_fails_at_the_database_leaves_nothing(backup, tmp_path, monkeypatch):
    source, _, known = backup
    settings = ServerSettings(**known["given"], folder=tmp_path / "new", port=free_port())
    with monkeypatch.context() as patch, pytest.raises(DemoError, match="No space left on device"):
        patch.setattr("server.backup._load", fill_the_disk)
        restore(settings, source)
    assert not list((settings.folder / "artifacts").iterdir()) and not (settings.folder / "mlflow.db").exists()
    restore(settings, source)


def test_a_backup_of_the_other_database_is_refused(backup, tmp_path):
    source, _, known = backup
    other = "local" if known["given"]["profile"] == "workshop" else "workshop"
    settings = ServerSettings(profile=other, folder=tmp_path / "new", port=free_port(), **make_secrets())
    with pytest.raises(DemoError, match="the backup is of a"):
        restore(settings, source)
    assert not settings.folder.exists()
