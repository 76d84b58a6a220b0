"""Reproducing a run: to the bit, whatever the threads; the first difference named; what differs here said first."""

import sqlite3

from demo_lib.__main__ import main
from demo_lib.config import DemoError, TrainConfig, TuneConfig
from demo_lib.ops.reproduce import METRICS, _threads, arrived, compare, differences, reproduce
from demo_lib.recipe import train
from demo_lib.store import connect
from demo_lib.tuning import tune

import mlflow
import pytest
import torch
from mlflow import MlflowClient

CONFIG = TrainConfig(train_images=500, epochs=2, channels=4, log_every=2, device="cpu")


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def logged(values, status="FINISHED", **tags):
    """Return a run of the given {metric: {step: value}}."""
    with mlflow.start_run(tags=tags) as run:
        for metric, history in values.items():
            for step, value in history.items():
                mlflow.log_metric(metric, value, step)
        mlflow.end_run(status)
    return mlflow.get_run(run.info.run_id)


def alter(home, run, metric, step):
    with sqlite3.connect(home / "store" / "mlflow.db") as database:
        where = "run_uuid = ? AND key = ? AND step = ?"
        done = database.execute(
            f"UPDATE metrics SET value = value + 1e-3 WHERE {where}", (run.info.run_id, metric, step)
        )
        assert done.rowcount == 1


def test_a_run_comes_out_the_same_to_the_bit_also_with_fewer_threads_here(home, two_threads, capsys):
    original = train(CONFIG)
    assert original.data.tags["cpu_threads"] == "2"
    torch.set_num_threads(1)
    result = reproduce(original.info.run_id[:8])
    assert result.difference is None and torch.get_num_threads() == 1
    assert "CPU threads: 2 then, 1 here" in capsys.readouterr().out
    tags = result.run.data.tags
    assert tags["reproduces"] == original.info.run_id and tags["cpu_threads"] == "2"
    assert mlflow.get_experiment(result.run.info.experiment_id).name == "reproduce"
    metrics = {"learning_rate", "test_accuracy", "test_loss", "train_loss", "val_accuracy", "val_loss"}
    assert set(result.metrics) == metrics == METRICS and not result.left_out
    steps = {point.step for point in MlflowClient().get_metric_history(original.info.run_id, "train_loss")}
    assert result.values == len(steps) + 3 * CONFIG.epochs + 2


def alter_device(home, run):
    with sqlite3.connect(home / "store" / "mlflow.db") as database:
        where = "run_uuid = ? AND key = 'device'"
        assert database.execute(f"UPDATE params SET value = 'cuda' WHERE {where}", (run.info.run_id,)).rowcount == 1


def test_an_altered_metric_is_named_with_its_step_and_exit_code_1(home, capsys):
    original = train(CONFIG)
    assert main(["reproduce", original.info.run_id]) == 0
    assert "the same: all " in capsys.readouterr().out
    alter(home, original, "train_loss", 4)
    history = MlflowClient().get_metric_history(original.info.run_id, "train_loss")
    value = next(point.value for point in history if point.step == 4)
    assert main(["reproduce", original.info.run_id]) == 1
    said = capsys.readouterr().out
    assert "NOT the same: 1 of " in said
    assert f"first train_loss at step 4: {value:.6g} then, {value - 1e-3:.6g} now, 0.001 apart" in said


@pytest.mark.parametrize("tag", ["", "0", "-1", "many", "9999"])
def test_a_tag_that_is_no_number_of_threads_changes_nothing(tag):
    assert _threads(tag) == torch.get_num_threads()


def test_a_trial_of_a_study_can_be_reproduced(home):
    config = TuneConfig(trials=1, train_images=300, epochs=1, max_channels=4, device="cpu", prune=False)
    parent = tune(config, storage="memory")
    child = parent.data.tags["best_run_id"]
    result = reproduce(child)
    assert result.difference is None and "val_accuracy" in result.metrics


def test_what_can_not_be_reproduced_is_one_sentence_and_exit_code_2(home, capsys):
    connect("bare")
    with mlflow.start_run() as run:
        mlflow.log_params({"epochs": 1, "seed": 0})
    assert main(["reproduce", run.info.run_id]) == 2
    assert "logged no train_images, batch_size" in capsys.readouterr().err
    assert main(["reproduce", "f" * 32]) == 2
    assert "no run has the id" in capsys.readouterr().err
    assert mlflow.get_experiment_by_name("reproduce") is None


def test_nothing_is_trained_where_nothing_can_be_compared(home, monkeypatch):
    connect("bare")
    with mlflow.start_run() as run:
        mlflow.log_params(CONFIG.model_dump())
        mlflow.log_metric("purity", 1.0)
    with pytest.raises(DemoError, match="has none of the metrics of a training"):
        reproduce(run.info.run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    with pytest.raises(DemoError, match="unset MLFLOW_RUN_ID"):
        reproduce(run.info.run_id)
    assert mlflow.get_experiment_by_name("reproduce") is None


def test_what_differs_here_is_said_before_the_training(home, capsys):
    original = train(CONFIG)
    assert not [line for line in differences(original) if "uncommitted" not in line]
    client = MlflowClient()
    other = {"data_digest": "0123", "torch_version": "2.0", "mlflow.source.git.commit": "abc", "git_dirty": "true"}
    for name, value in other.items():
        client.set_tag(original.info.run_id, name, value)
    client.delete_tag(original.info.run_id, "python_version")
    capsys.readouterr()
    reproduce(original.info.run_id)
    said, trained, _ = capsys.readouterr().out.partition("fashion-mnist")
    assert trained
    for text in (
        "commit: abc then",
        "torch: 2.0 then, 2.",
        "Python: not recorded then, 3.",
        "uncommitted changes then",
    ):
        assert text in said
    assert f"digest of the data: 0123 then, {original.data.tags['data_digest']} here" in said


def test_a_device_that_is_not_here_is_named_and_another_taken(home):
    if torch.cuda.is_available():
        pytest.skip("this machine has the other device")
    original = train(TrainConfig(**CONFIG.model_dump() | {"device": "auto", "epochs": 1}))
    MlflowClient().set_tag(original.info.run_id, "device", "cuda")
    alter_device(home, original)
    here = original.data.tags["device"]
    assert f"device: cuda then, {here} here" in differences(mlflow.get_run(original.info.run_id))
    assert reproduce(original.info.run_id).run.data.params["device"] == "auto"


@pytest.mark.parametrize(
    ("then", "now", "status", "difference"),
    [
        ({"a": {1: 1.0, 2: 2.0}}, {"a": {1: 1.0, 2: 2.0}}, "FINISHED", None),
        ({"a": {1: float("nan")}}, {"a": {1: float("nan")}}, "FINISHED", None),
        ({"a": {1: float("nan")}}, {"a": {1: 1.0}}, "FINISHED", "a at step 1: nan then, 1 now"),
        ({"a": {1: 1.0, 3: 2.0}, "b": {2: 1.0}}, {"a": {1: 1.0, 3: 9.0}, "b": {2: 9.0}}, "FINISHED", "b at step 2"),
        ({"a": {1: 0.1}}, {"a": {1: 0.1 + 2**-56}}, "FINISHED", "a at step 1: 0.1 then, 0.1 now, 1e-17 apart"),
        ({"a": {1: 1.0, 2: 2.0}}, {"a": {1: 1.0}}, "FINISHED", "a at step 2: 2 then, none now"),
        ({"a": {1: 1.0}}, {"a": {1: 1.0, 2: 2.0}}, "FINISHED", "a at step 2: none then, 2 now"),
        ({"a": {1: 1.0}}, {"a": {1: 1.0, 2: 2.0}}, "KILLED", None),
        ({"a": {1: 1.0}, "fit_seconds": {1: 3.0}}, {"a": {1: 1.0}, "fit_seconds": {1: 4.0}}, "FINISHED", None),
        ({"a": {1: 1.0}, "system/cpu": {1: 3.0}}, {"a": {1: 1.0}, "system/cpu": {1: 4.0}}, "FINISHED", None),
    ],
)
def test_compare_finds_the_first_difference_and_no_other(home, then, now, status, difference):
    connect("compared")
    result = compare(logged(then, status), logged(now))
    if difference is None:
        assert result.difference is None and result.metrics == ["a"]
    else:
        assert f"first {difference}" in result.difference


def test_metrics_that_a_training_does_not_log_are_left_out_and_named(home):
    connect("compared")
    mine = logged({"a": {1: 1.0}, "purity": {1: 1.0}})
    assert str(compare(mine, logged({"a": {1: 1.0}}))).endswith("not compared: purity")
    with pytest.raises(DemoError, match=r"none of the metrics of a training \(b\)"):
        compare(mine, logged({"b": {1: 1.0}}))


def test_what_arrives_of_a_run_is_counted_by_kind(home, tmp_path):
    connect("copies")
    folders = [tmp_path / "then", tmp_path / "now"]
    for folder, text in zip(folders, ("one", "other"), strict=True):
        folder.mkdir()
        (folder / "same.txt").write_text("same")
        (folder / "file.txt").write_text(text)
    mine, other = logged({"a": {1: 1.0, 2: 2.0}}, kind="a"), logged({"a": {1: 1.0}}, kind="a", new="b")
    points = MlflowClient().get_metric_history(mine.info.run_id, "a")
    whole = arrived((mine, points, folders[0]), (mine, points, folders[0]))
    assert (whole.before == whole.arrived).all() and (whole.before["run id"], whole.before["metric values"]) == (1, 2)
    table = arrived((mine, points, folders[0]), (other, points[:1], folders[1]))
    assert table.loc["run id"].tolist() == [1, 0] and table.loc["metric values"].tolist() == [2, 1]
    assert table.loc["files"].tolist() == [2, 1] and table.loc["models"].tolist() == [0, 0]
    assert table.before["tags"] > table.arrived["tags"] >= 1  # each run has a name of its own
