"""Cleaning up takes what is deleted, with what hangs on it, and nothing else: rows and files are counted after."""

from pathlib import Path

from demo_lib.config import DemoError
from demo_lib.ops.processes import free_port

import pytest
import sqlalchemy
from mlflow import MlflowClient

from server.cleanup import clean_up
from server.client import as_admin
from server.database import database_address
from server.settings import ServerSettings
from tests.server.conftest import make_secrets

pytestmark = pytest.mark.xdist_group("server")
DAY = 86_400_000


@pytest.fixture(params=["local", "workshop"])
def site(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = request.getfixturevalue(request.param)
    with as_admin(found.settings):
        yield found
    assert list(tmp_path.iterdir()) == []  # MLflow's own default would leave a folder mlruns


def run_in(experiment, parent=None, text="kept"):
    client = MlflowClient()
    run_id = client.create_run(experiment, tags={"mlflow.parentRunId": parent} if parent else {}).info.run_id
    client.log_metric(run_id, "loss", 0.5)
    client.log_text(run_id, text, "text.txt")
    return run_id


def files(site, name="*"):
    return [str(path) for path in Path(site.settings.artifact_root).rglob(name) if path.is_file()]


def ask(site, query):
    engine = sqlalchemy.create_engine(database_address(site.settings))
    try:
        with engine.begin() as connection:
            answer = connection.execute(sqlalchemy.text(query))
            return sorted(answer.scalars()) if answer.returns_rows else None
    finally:
        engine.dispose()


def clean(site, older_than="0s", **options):
    return clean_up(site.settings, older_than, **options)


def test_descendants_of_deleted_runs_go_and_the_rest_stays(site):
    client = MlflowClient()
    experiment = client.create_experiment("descendants")
    kept, parent, empty = run_in(experiment), run_in(experiment), client.create_run(experiment).info.run_id
    child = run_in(experiment, parent)
    grandchild, kept_child = run_in(experiment, child), run_in(experiment, kept)
    client.set_tag(parent, "mlflow.parentRunId", grandchild)  # tags are the users' own: a circle ends too
    client.delete_run(parent)
    client.delete_run(empty)
    gone = sorted([parent, child, grandchild, empty])
    assert clean(site, "1d").runs == []
    found = clean(site, dry_run=True)
    assert found.runs == gone
    assert len(client.search_runs([experiment])) == 4
    assert clean(site) == found
    assert ask(site, f"SELECT run_uuid FROM runs WHERE experiment_id = {experiment}") == sorted([kept, kept_child])
    for table in ("metrics", "latest_metrics", "tags"):
        assert not set(gone) & set(ask(site, f"SELECT run_uuid FROM {table}"))
    left = [path for path in files(site) if f"/{experiment}/" in path]
    assert len(left) == 2 and all(kept in path or kept_child in path for path in left)
    assert client.get_metric_history(kept, "loss")[0].value == 0.5


def test_what_was_deleted_lately_stays_while_an_old_run_and_its_children_go(site):
    client = MlflowClient()
    experiment, lately = client.create_experiment("old"), client.create_experiment("lately")
    old, new, other = run_in(experiment), run_in(experiment), run_in(lately)
    child, model = run_in(experiment, old), client.create_logged_model(experiment).model_id
    for run_id in (old, new):
        client.delete_run(run_id)
    client.delete_logged_model(model)
    client.delete_experiment(lately)
    ask(site, f"UPDATE runs SET deleted_time = deleted_time - {2 * DAY} WHERE run_uuid = '{old}'")
    found = clean(site, "1d")
    assert found.runs == sorted([old, child]) and found.models == found.experiments == []
    assert client.get_experiment(lately).lifecycle_stage == "deleted"
    assert {new, other} <= set(ask(site, "SELECT run_uuid FROM runs"))
    assert ask(site, f"SELECT model_id FROM logged_models WHERE experiment_id = {experiment}") == [model]
    assert len(files(site, "text.txt")) >= 2 and any(other in path for path in files(site))
    clean(site)


def test_a_deleted_experiment_goes_with_its_runs_and_the_files_of_its_models(site, tmp_path_factory):
    client, source = MlflowClient(), tmp_path_factory.mktemp("model")
    (source / "weights").write_bytes(bytes(1000))
    experiment = client.create_experiment("whole")
    run_id, model = run_in(experiment, text="four"), client.create_logged_model(experiment).model_id
    client.log_model_artifacts(model, str(source))
    client.delete_experiment(experiment)
    # A run that is deleted later than its experiment makes plain `mlflow gc --older-than` refuse everything.
    past = f"last_update_time = last_update_time - {2 * DAY}"
    ask(site, f"UPDATE experiments SET {past} WHERE experiment_id = {experiment}")
    found = clean(site, "1d")
    assert (found.runs, found.models, found.experiments) == ([run_id], [model], [experiment])
    for table in ("experiments", "runs", "logged_models"):
        assert int(experiment) not in ask(site, f"SELECT experiment_id FROM {table}")
    assert not (Path(site.settings.artifact_root) / experiment).exists()


def test_what_the_registry_needs_is_kept_and_named(site, tmp_path_factory):
    client, source = MlflowClient(), tmp_path_factory.mktemp("model")
    (source / "MLmodel").write_text("flavors: {}")
    experiment = client.create_experiment("registered")
    run_id, model = run_in(experiment), client.create_logged_model(experiment).model_id
    client.log_model_artifacts(model, str(source))
    client.create_registered_model("needed")
    client.create_model_version("needed", f"models:/{model}", model_id=model)
    client.delete_experiment(experiment)
    found = clean(site)
    assert found.runs == found.models == found.experiments == []
    assert found.kept[0] == f"kept {model}: version 1 of needed is made of it; delete that version first."
    assert files(site, "MLmodel") and any(run_id in path for path in files(site))
    client.delete_model_version("needed", "1")
    found = clean(site)
    assert (found.runs, found.models, found.experiments, found.kept) == ([run_id], [model], [experiment], [])
    assert not files(site, "MLmodel")
    client.delete_registered_model("needed")


@pytest.mark.parametrize("text", ["soon", "", "3", "d", "-1d", "1.5h"])
def test_a_time_that_is_none_is_refused(local, text):
    with pytest.raises(DemoError, match="is no time"):
        clean_up(local.settings, text)


def test_no_server_and_a_wrong_password_are_refused(workshop, tmp_path):
    with pytest.raises(DemoError, match="no server runs"):
        clean_up(ServerSettings(folder=tmp_path, port=free_port()), "1d")
    with pytest.raises(DemoError, match="administrator's password is refused"):
        clean_up(workshop.settings.model_copy(update=make_secrets()), "1d")
