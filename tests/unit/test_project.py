"""The repository as an MLflow Project: the file, its runs, what is refused, and git addresses."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from demo_lib.config import ROOT, DemoError, TrainConfig, TuneConfig
from demo_lib.ops.processes import live_output
from demo_lib.runs import config_of
from demo_lib.store import connect, open_store
from demo_lib.tracking import log_config
from demo_lib.tuning import tune

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import ExecutionException

SMALL = {"train_images": 300, "epochs": 1, "channels": 4, "device": "cpu"}
# Right values in other words than MLflow would write them.
WORDS = {"flip": "true", "learning_rate": "1e-2", "weight_decay": "0", "dropout": "0.10"}
MEANT = TrainConfig(**SMALL, flip=True, learning_rate=0.01, weight_decay=0.0, dropout=0.1)


@pytest.fixture
def store(home, monkeypatch):
    """The store, chosen, with this Python the first on the path: a project's command starts `python`."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", open_store())
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)  # an earlier test's
    return home


@pytest.fixture
def copy(tmp_path):
    """A plain copy of the project, no git repository, in a folder with a space in its name."""
    folder = tmp_path / "my projects" / "demo"
    folder.mkdir(parents=True)
    for name in ("MLproject", "environment.yml", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("demo_lib", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    return folder


def all_runs():
    return mlflow.search_runs(search_all_experiments=True, output_format="list")


def run(entry_point, parameters, folder=ROOT):
    with live_output():
        return mlflow.projects.run(
            str(folder), entry_point, parameters=parameters, experiment_id="0", env_manager="local"
        )


@pytest.mark.parametrize(
    ("entry_point", "config"), [("train", TrainConfig()), ("main", TrainConfig()), ("tune", TuneConfig())]
)
def test_the_file_has_the_names_types_and_defaults_of_the_configurations(entry_point, config):
    entry = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"][entry_point]
    defaults = {name: each["default"] for name, each in entry["parameters"].items()}
    assert defaults == config.model_dump() and list(defaults) == list(type(config).model_fields)
    for name, each in entry["parameters"].items():
        number = type(each["default"]) in (int, float)
        assert type(each["default"]) is type(getattr(config, name))
        assert each["type"] == ("float" if number else "string")
        assert f"--{name.replace('_', '-')} {{{name}}}" in entry["command"]


def test_mlflow_run_works_from_elsewhere_in_a_path_with_a_space_and_makes_one_run(store, copy, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    options = [f"-P{name}={value}" for name, value in (SMALL | WORDS).items()]
    command = [sys.executable, "-m", "mlflow", "run", str(copy), "--env-manager", "local", "-e", "train", *options]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = all_runs()
    assert made.info.status == "FINISHED" and made.info.run_id in done.stdout
    assert config_of(made) == MEANT and made.data.params["flip"] == "true"
    assert {"test_accuracy", "val_loss", "train_loss"} <= made.data.metrics.keys()
    tags = made.data.tags
    assert (tags["mlflow.source.type"], tags["mlflow.project.entryPoint"]) == ("PROJECT", "train")
    assert "demo" in tags["mlflow.source.name"] and tags["cpu_threads"] == "1"
    assert not any((tmp_path / "elsewhere").iterdir()) and not (copy / "store").exists()


def test_the_lesson_entry_point_is_one_batch_in_the_run_that_mlflow_opened(store):
    submitted = run("lesson", {"lesson": "00"})
    batch = mlflow.get_run(submitted.run_id)
    assert batch.info.status == "FINISHED" and batch.data.params["lesson"] == "00"
    others = [each for each in all_runs() if each.info.run_id != submitted.run_id]
    (lesson,) = [each for each in others if each.info.run_name == "00_start_here"]
    made = [each for each in others if each is not lesson]
    assert lesson.data.tags["mlflow.parentRunId"] == submitted.run_id and made
    assert {mlflow.get_experiment(each.info.experiment_id).name for each in made} == {"00_start_here"}


def open_as_mlflow_run_does(monkeypatch, experiment_id="0", **params):
    client = MlflowClient()
    opened = client.create_run(experiment_id).info.run_id
    client.log_batch(opened, params=[Param(name, value) for name, value in params.items()])
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    return opened


def test_a_study_lives_in_the_run_that_mlflow_opened_and_goes_on_there(store, monkeypatch):
    config = TuneConfig(study="my study", trials=1, train_images=300, epochs=1, max_channels=4, device="cpu")
    first = open_as_mlflow_run_does(monkeypatch, study="'my study'", epochs="1", prune="true", trials="1")
    assert tune(config).info.run_id == first
    open_as_mlflow_run_does(monkeypatch, connect("other").experiment_id, study="'my study'")
    assert tune(config.model_copy(update={"trials": 2})).info.run_id == first
    children = [each for each in all_runs() if each.data.tags.get("mlflow.parentRunId") == first]
    assert len(children) == 2 and len(all_runs()) == 4
    assert {each.info.experiment_id for each in children} == {"0"}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"epochs": 0}, "error: epochs = '0' is not allowed: it should be greater than or equal to 1."),
        ({"flip": "maybe"}, "error: flip = 'maybe' is not allowed: it should be a valid boolean, unable to"),
        ({"epoch": 1}, "error: unrecognized arguments: --epoch 1"),
        ({"seed": "0; touch hacked"}, "error: seed = '0; touch hacked' is not allowed"),
    ],
)
def test_a_bad_parameter_is_named_and_the_run_fails(store, copy, parameters, message, capfd):
    with pytest.raises(ExecutionException, match="failed"):
        run("train", parameters, copy)
    assert message in capfd.readouterr().out
    (made,) = all_runs()
    assert made.info.status == "FAILED" and not (copy / "hacked").exists()


def test_a_missing_entry_point_is_named_and_opens_no_run(store):
    with pytest.raises(ExecutionException, match=r"trian among entry points \['train', 'tune', 'lesson', 'main'\]"):
        run("trian", {})
    assert not all_runs()


def test_a_run_that_is_in_another_store_is_one_sentence(home, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    with pytest.raises(DemoError, match=r"is no open run of the store sqlite:.*set MLFLOW_TRACKING_URI to a"):
        connect("train")


def test_a_run_that_has_ended_is_not_gone_on_with(home, monkeypatch):
    connect("train")
    with mlflow.start_run() as ended:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", ended.info.run_id)
    with pytest.raises(
        DemoError, match=r"is no open run of the store .*: unset MLFLOW_RUN_ID; but if this is in `mlflow run`"
    ):
        connect("train")
    assert mlflow.get_run(ended.info.run_id).info.status == "FINISHED"


def test_a_parameter_that_mlflow_logged_as_it_was_typed_is_left(home):
    connect("values")
    with mlflow.start_run() as active:
        mlflow.log_params({"epochs": "7", "flip": "no", "seed": "0"})
        log_config(TrainConfig(epochs=7))
    assert config_of(mlflow.get_run(active.info.run_id)) == TrainConfig(epochs=7)
