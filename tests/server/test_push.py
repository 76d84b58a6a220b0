"""A participant copies runs to the workshop server, with a login."""

from demo_lib.config import DemoError
from demo_lib.ops.push import push
from demo_lib.store import connect

import mlflow
import pytest
from mlflow import MlflowClient

from server.client import signed_in

pytestmark = pytest.mark.xdist_group("server")


@pytest.fixture
def run_id(home):
    """Return the id of a run in this machine's own store, with a registered model."""
    connect("train")
    with mlflow.start_run(run_name="at home") as run:
        mlflow.log_metric("accuracy", 0.5, step=3)
        mlflow.log_text("text", "notes.txt")
        about = {"pip_requirements": ["mlflow"], "registered_model_name": "echo"}
        mlflow.pyfunc.log_model(name="echo", python_model=lambda model_input: model_input, input_example=["a"], **about)
    return run.info.run_id


def test_a_participant_copies_a_run_to_an_experiment_of_their_own(workshop, people, run_id, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", people["ann"])
    copy = push(run_id, workshop.url, register=True)
    assert push(run_id, workshop.url, register=True).info.run_id == copy.info.run_id
    client = MlflowClient(workshop.url, workshop.url)
    assert client.get_experiment(copy.info.experiment_id).name == "ann/train"
    (version,) = client.search_model_versions(f"run_id = '{copy.info.run_id}'")
    assert (version.name, version.tags["copied_from"]) == ("ann.echo", "echo/1")
    mlflow.set_tracking_uri(workshop.url)
    for uri in (f"models:/{version.name}/{version.version}", f"runs:/{copy.info.run_id}/echo"):
        assert mlflow.pyfunc.load_model(uri).predict(["a"]).iloc[0, 0] == "a"


@pytest.mark.parametrize("experiment", ["bob/train", "shared/example"])
def test_where_a_participant_may_not_write_is_one_sentence(workshop, people, run_id, experiment):
    with pytest.raises(DemoError, match="--experiment"):
        push(run_id, workshop.url, experiment, login=("ann", people["ann"]))
    with pytest.raises(DemoError, match="refuses you"):
        push(run_id, workshop.url, login=("ann", "a wrong password"))


@pytest.mark.parametrize("in_the_address", [False, True])
def test_a_login_for_each_of_two_servers(workshop, people, run_id, login, monkeypatch, in_the_address):
    with signed_in(workshop.url, "bob", people["bob"]):
        here = MlflowClient().get_experiment_by_name("bob/train").experiment_id
        bobs = MlflowClient().create_run(here, run_name="bob's").info.run_id
        MlflowClient().log_text(bobs, "text", "notes.txt")
        MlflowClient().set_terminated(bobs)
    if in_the_address:  # the environment's is for the other server
        login("ann", people["ann"])
        monkeypatch.setenv("MLFLOW_TRACKING_URI", workshop.url.replace("//", f"//bob:{people['bob']}@"))
        copy = push(bobs, workshop.url)
    else:
        login("bob", people["bob"])
        copy = push(bobs, workshop.url, login=("ann", people["ann"]))
    with signed_in(workshop.url, "ann", people["ann"]):
        assert MlflowClient().get_experiment(copy.info.experiment_id).name == "ann/train"
        assert [each.path for each in MlflowClient().list_artifacts(copy.info.run_id)] == ["notes.txt"]
