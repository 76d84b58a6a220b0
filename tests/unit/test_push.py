"""Copies of runs on another store: whole, once, completed after an interruption, and usable."""

import math
import shutil
from itertools import count
from pathlib import Path

from demo_lib.__main__ import main
from demo_lib.config import DemoError, sqlite_uri
from demo_lib.ops.push import push
from demo_lib.store import connect

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.utils import rest_utils

from tests.tools.processes import mlflow_server

PARENT, ORIGIN = "mlflow.parentRunId", "copied_from"
TEXTS = pd.DataFrame({"text": ["small", "words"]})


class Loud(mlflow.pyfunc.PythonModel):
    """Writes texts in capitals."""

    def predict(self, context, model_input, params=None):
        return [text.upper() for text in model_input["text"]]


@pytest.fixture(scope="module")
def server(template, tmp_path_factory):
    """The address of a server; each test has experiments of its own there."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(template / "store" / "mlflow.db", folder / "mlflow.db")
    with mlflow_server(folder) as uri:
        yield uri


@pytest.fixture
def family(home):
    """Return the id of a run with two children, of which one has a child and a model."""
    connect("study")
    client, data = MlflowClient(), mlflow.data.from_numpy(np.zeros(3), name="small")
    with mlflow.start_run(run_name="parent", tags={"note": "two\nlines"}) as parent:
        mlflow.log_input(data, "training")
        mlflow.log_params({"trials": 2, "empty": ""})
        with mlflow.start_run(run_name="pruned", nested=True) as pruned:
            mlflow.log_metric("loss", math.nan, step=3)
        client.set_terminated(pruned.info.run_id, "KILLED", end_time=1_700_000_000_123)
        with mlflow.start_run(run_name="best", nested=True) as best:
            points = [Metric("loss", 1 / step, 1_700_000_000_000 + step, step) for step in range(1, 1_200)]
            points += [Metric("loss", math.nan, 5, 7), Metric("loss", -math.inf, 5, 8), Metric("loss", 0.1 + 0.2, 6, 7)]
            client.log_batch(best.info.run_id, points, [Param(f"p{number}", "v") for number in range(120)])
            mlflow.log_text("three layers", "about/model.txt")
            mlflow.log_text("ü", "notes.txt")
            about = {"pip_requirements": ["mlflow"], "params": {"depth": 3}, "tags": {"kind": "loud"}}
            made = mlflow.pyfunc.log_model(name="loud", python_model=Loud(), **about)
            mlflow.log_metric("score", 0.75, step=2, model_id=made.model_id, dataset=data)
            mlflow.log_metric("score", math.nan, step=3, model_id=made.model_id)
            with mlflow.start_run(run_name="again", nested=True):
                mlflow.log_metric("loss", 0.5)
        mlflow.log_metric("test_score", 0.5, model_id=made.model_id)
        mlflow.set_tag("best_run_id", best.info.run_id)
    return parent.info.run_id


def files_at(uri, address):
    folder = Path(mlflow.artifacts.download_artifacts(address, tracking_uri=uri))
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def models_at(client, run):
    return client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")


def told(client, run_id):
    """Return all that the run, its models and its children have, as values that don't hold an id."""
    uri, run = client.tracking_uri, client.get_run(run_id)
    tags = {name: value for name, value in run.data.tags.items() if name not in (PARENT, ORIGIN, "best_run_id")}
    models = {}
    for model in models_at(client, run):
        metrics = {(p.key, p.timestamp, p.step, p.value, p.dataset_name, p.dataset_digest) for p in model.metrics or ()}
        files = {path: data for path, data in files_at(uri, model.artifact_location).items() if path != "MLmodel"}
        known = {name: value for name, value in model.tags.items() if name not in (ORIGIN, "mlflow.modelVersions")}
        models[model.name] = (model.params, known, model.status, metrics, files)
    has_files = client.list_artifacts(run_id)
    children = client.search_runs([run.info.experiment_id], f"tags.`{PARENT}` = '{run_id}'")
    return {
        "about": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time, run.info.user_id),
        "params": run.data.params,
        "tags": tags,
        "points": sorted(
            (point.key, point.timestamp, point.step, repr(point.value))
            for name in run.data.metrics
            for point in client.get_metric_history(run_id, name)
        ),
        "data": [(vars(each.dataset), [vars(tag) for tag in each.tags]) for each in run.inputs.dataset_inputs],
        "uses": len(run.inputs.model_inputs),
        "made": len(run.outputs.model_outputs),
        "files": files_at(uri, run.info.artifact_uri) if has_files else {},
        "models": models,
        "children": sorted([told(client, each.info.run_id) for each in children], key=lambda each: each["about"]),
    }


def everything(uri, experiment):
    """Return all runs, models and versions of the experiment as they are, also their ids."""
    client = MlflowClient(uri, uri)
    number = client.get_experiment_by_name(experiment).experiment_id
    runs = [client.get_run(each.info.run_id).to_dictionary() for each in client.search_runs([number])]
    models = [each.to_dictionary() for each in client.search_logged_models([number])]
    points = [told(client, each["info"]["run_id"])["points"] for each in runs]
    return runs, models, points, [vars(each) for each in client.search_model_versions()]


@pytest.mark.xdist_group("server")
def test_a_family_arrives_with_all_it_has_and_a_second_call_changes_nothing(family, server):
    original = told(MlflowClient(), family)
    copy = push(family, server)
    there = MlflowClient(server, server)
    assert told(there, copy.info.run_id) == original
    assert len(original["children"][0]["points"]) == 1_204 and original["children"][0]["children"]
    tags = copy.data.tags
    assert tags[ORIGIN] == family and there.get_run(tags["best_run_id"]).info.run_name == "best"
    before = everything(server, "study")
    assert push(family[:8], server).info.run_id == copy.info.run_id
    assert str(everything(server, "study")) == str(before)


@pytest.mark.xdist_group("server")
def test_a_copied_model_can_be_used(family, server):
    copy = push(family, server, "usable")
    client = MlflowClient(server, server)
    best = client.get_run(copy.data.tags["best_run_id"])
    (model,) = models_at(client, best)
    mlflow.set_tracking_uri(server)
    for uri in (model.model_uri, f"runs:/{best.info.run_id}/loud"):
        loaded = mlflow.pyfunc.load_model(uri)
        assert loaded.predict(TEXTS) == ["SMALL", "WORDS"]
        about = loaded.metadata
        assert (about.model_id, about.run_id) == (model.model_id, best.info.run_id)
        assert about.artifact_path == model.artifact_location


class Killed(BaseException):
    """Nothing catches this."""


def interrupted_at(monkeypatch, number, after):
    """Let the process 'die' before or after the server has answered the call of this number."""
    calls, real = count(1), rest_utils._get_http_response_with_retries

    def call(*arguments, **options):
        this = next(calls)
        if this == number and not after:
            raise Killed
        answer = real(*arguments, **options)
        if this == number:
            raise Killed
        return answer

    monkeypatch.setattr(rest_utils, "_get_http_response_with_retries", call)


@pytest.mark.slow
@pytest.mark.xdist_group("server")
@pytest.mark.parametrize("after", [False, True])
def test_a_copy_that_was_interrupted_at_any_call_is_completed(family, server, after):
    original = told(MlflowClient(), family)
    version = mlflow.register_model(models_of_best(family)[0].model_uri, f"interrupted-{after}")
    client = MlflowClient(server, server)
    for number in count(2 if after else 1, 6):  # each one of all calls takes ten minutes
        name = f"interrupted {after} {number}"
        with pytest.MonkeyPatch.context() as patch:
            interrupted_at(patch, number, after)
            try:
                push(family, server, name, register=True)
                break
            except Killed:
                pass
        copy = push(family, server, name, register=True)
        assert told(client, copy.info.run_id) == original, f"call {number}"
        found = client.get_experiment_by_name(name).experiment_id
        assert (len(client.search_runs([found])), len(client.search_logged_models([found]))) == (4, 1), f"call {number}"
        versions = client.search_model_versions(f"run_id = '{copy.data.tags['best_run_id']}'")
        assert [each.tags[ORIGIN] for each in versions] == [f"{version.name}/{version.version}"], f"call {number}"
    assert number > 40


def models_of_best(family):
    client = MlflowClient()
    return models_at(client, client.get_run(client.get_run(family).data.tags["best_run_id"]))


def test_a_run_that_went_on_is_completed(family, tmp_path, capsys):
    target = sqlite_uri(tmp_path / "other" / "mlflow.db")
    there, here = MlflowClient(target, target), MlflowClient()
    with mlflow.start_run(run_name="long", tags={"process": "here:1:2"}) as run:
        mlflow.log_metric("loss", 1.0, step=1)
        mlflow.log_text("weights 1", "checkpoint")
        copy = push(run.info.run_id, target)
        assert "the runs that still go on (1 of 1)" in capsys.readouterr().out
        assert copy.info.status == "RUNNING" and "process" not in copy.data.tags
        mlflow.log_metric("loss", 0.5, step=2)
        mlflow.log_text("weights 2", "checkpoint")  # as many bytes as before
        mlflow.log_text("new", "notes.txt")
        mlflow.set_tag("state", "late")
        with mlflow.start_run(run_name="late child", nested=True):
            mlflow.log_param("late", True)
    again = push(run.info.run_id, target)
    assert again.info.run_id == copy.info.run_id
    assert told(there, copy.info.run_id) == told(here, run.info.run_id)
    assert not capsys.readouterr().out


def test_a_child_that_was_copied_alone_finds_its_parent_later(family, tmp_path, capsys):
    target = sqlite_uri(tmp_path / "other" / "mlflow.db")
    best = MlflowClient().get_run(family).data.tags["best_run_id"]
    alone = push(best, target)
    said = capsys.readouterr().out
    assert "stays behind: the run's parent" in said and "values that other runs logged for these models (1)" in said
    assert PARENT not in alone.data.tags
    parent = push(family, target)
    there = MlflowClient(target, target)
    assert there.get_run(alone.info.run_id).data.tags[PARENT] == parent.info.run_id
    assert told(there, parent.info.run_id) == told(MlflowClient(), family)


def test_versions_are_registered_on_request_and_what_stays_behind_is_said(family, tmp_path, capsys):
    target, client = sqlite_uri(tmp_path / "other" / "mlflow.db"), MlflowClient()
    (model,) = models_of_best(family)
    for tags in ({"gate": "passed"}, {}):
        mlflow.register_model(model.model_uri, "loud", tags=tags)
    client.update_model_version("loud", "1", "the first")
    client.update_registered_model("loud", "in capitals")
    client.set_registered_model_alias("loud", "champion", "2")
    with mlflow.start_run(run_id=family), mlflow.start_span("asked"):
        pass
    mlflow.flush_trace_async_logging()
    assert main(["push", family, "--to", target]) == 0
    said = capsys.readouterr().out
    assert "registered versions of these models (2): add --register" in said and "traces of the runs (1 of 4" in said
    there = MlflowClient(target, target)
    assert not there.search_model_versions()
    for _ in range(2):
        assert main(["push", family, "--to", target, "--register"]) == 0
        assert "the alias champion" in capsys.readouterr().out
        found = sorted(there.search_model_versions("name = 'loud'"), key=lambda each: int(each.version))
        assert [(each.description, each.tags) for each in found] == [
            ("the first", {"gate": "passed", ORIGIN: "loud/1"}),
            (None, {ORIGIN: "loud/2"}),
        ]
    assert there.get_registered_model("loud").description == "in capitals"
    mlflow.set_tracking_uri(target)
    assert mlflow.pyfunc.load_model("models:/loud/2").predict(TEXTS) == ["SMALL", "WORDS"]


def test_a_model_of_another_run_is_linked_once_that_is_copied(family, tmp_path, capsys):
    target, (model,) = sqlite_uri(tmp_path / "other" / "mlflow.db"), models_of_best(family)
    with mlflow.start_run(run_name="evaluation") as run:
        mlflow.log_metric("recall", 0.25, model_id=model.model_id)
    first = push(run.info.run_id, target)
    assert "the links to models of other runs (1)" in capsys.readouterr().out
    there = MlflowClient(target, target)
    assert not there.get_run(first.info.run_id).inputs.model_inputs
    family_copy = push(family, target)
    again = push(run.info.run_id, target)
    (used,) = there.get_run(again.info.run_id).inputs.model_inputs
    copied = there.get_logged_model(used.model_id)
    assert copied.source_run_id == family_copy.data.tags["best_run_id"]
    assert [each.value for each in copied.metrics if each.run_id == again.info.run_id] == [0.25]


def test_a_copy_is_not_mixed_up_with_an_active_model(family, tmp_path):
    target = sqlite_uri(tmp_path / "other" / "mlflow.db")
    mlflow.set_active_model(model_id=models_of_best(family)[0].model_id)
    copy = push(family, target)
    assert told(MlflowClient(target, target), copy.info.run_id) == told(MlflowClient(), family)


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ("http://127.0.0.1:1", "no MLflow server answers at http://127.0.0.1:1: start it, or correct --to"),
        ("http://ana:secret@127.0.0.1:1", "leave the login out of --to"),
        ("ftp://example.org", "is no store: give a server's http address"),
        ("{home}/store/mlflow.db", "is no store"),
        ("sqlite:///{home}/store/mlflow.db", "has run .* already: name another store"),
        ("sqlite:///{home}/data", "can't be used"),
    ],
)
def test_a_wrong_address_is_one_sentence(family, home, to, reason):
    with pytest.raises(DemoError, match=reason) as error:
        push(family, to.format(home=home))
    assert "secret" not in str(error.value)


def test_an_unknown_run_and_a_deleted_experiment_are_one_sentence(family, tmp_path, capsys):
    target = sqlite_uri(tmp_path / "other" / "mlflow.db")
    assert main(["push", "f" * 32, "--to", target]) == 2
    assert "no run's id begins with" in capsys.readouterr().err
    push(family, target)
    there = MlflowClient(target, target)
    there.delete_experiment(there.get_experiment_by_name("study").experiment_id)
    with pytest.raises(DemoError, match=r"experiment 'study' can't be used there .*: name another with --experiment"):
        push(family, target)
    assert push(family, target, "elsewhere").info.status == "FINISHED"
