"""Reproducing a run: to the bit, whatever the threads; the first difference named; what differs here said first."""

import sqlite3

from demo_lib.__main__ import main
from demo_lib.config import DemoError, TrainConfig, TuneConfig
from demo_lib.ops.reproduce import compare, differences, reproduce
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


def test_a_run_comes_out_the_same_to_the_bit_also_with_fewer_threads_here(home, two_threads):
    original = train(CONFIG)
    assert original.data.tags["cpu_threads"] == "2"
    torch.set_num_threads(1)
    result = reproduce(original.info.run_id[:8])
    assert result.same
    tags = result.run.data.tags
    assert tags["reproduces"] == original.info.run_id and tags["cpu_threads"] == "2"
    assert mlflow.get_experiment(result.run.info.experiment_id).name == "reproduce"
    metrics = "learning_rate, test_accuracy, test_loss, train_loss, val_accuracy, val_loss"
    steps = {point.step for point in MlflowClient().get_metric_history(original.info.run_id, "train_loss")}
    values = len(steps) + 3 * CONFIG.epochs + 2
    assert str(result) == f"the same: all {values} values of {metrics} are equal to the last bit"


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
    assert f"first train_loss at step 4: {value:.9g} then, {value - 1e-3:.9g} now" in said


def test_a_trial_of_a_study_can_be_reproduced(home):
    config = TuneConfig(trials=1, train_images=300, epochs=1, max_channels=4, device="cpu", prune=False)
    parent = tune(config, storage="memory")
    child = parent.data.tags["best_run_id"]
    result = reproduce(child)
    assert result.same and "val_accuracy" in str(result)


def test_what_can_not_be_reproduced_is_one_sentence_and_exit_code_2(home, capsys):
    connect("bare")
    with mlflow.start_run() as run:
        mlflow.log_params({"epochs": 1, "seed": 0})
    assert main(["reproduce", run.info.run_id]) == 2
    assert "logged no train_images, batch_size" in capsys.readouterr().err
    assert main(["reproduce", "f" * 32]) == 2
    assert "no run's id begins with" in capsys.readouterr().err
    assert mlflow.get_experiment_by_name("reproduce") is None
    if not torch.cuda.is_available():
        original = train(CONFIG)
        MlflowClient().set_tag(original.info.run_id, "device", "cuda")
        assert main(["reproduce", original.info.run_id]) == 2
        assert "device = 'cuda' is not on this machine" in capsys.readouterr().err
        assert not mlflow.search_runs(experiment_names=["reproduce"], output_format="list")


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


@pytest.mark.parametrize(
    ("then", "now", "status", "difference"),
    [
        ({"a": {1: 1.0, 2: 2.0}}, {"a": {1: 1.0, 2: 2.0}}, "FINISHED", None),
        ({"a": {1: float("nan")}}, {"a": {1: float("nan")}}, "FINISHED", None),
        ({"a": {1: float("nan")}}, {"a": {1: 1.0}}, "FINISHED", "a at step 1: nan then, 1 now"),
        ({"a": {1: 1.0, 3: 2.0}, "b": {2: 1.0}}, {"a": {1: 1.0, 3: 9.0}, "b": {2: 9.0}}, "FINISHED", "b at step 2"),
        ({"a": {1: 0.1}}, {"a": {1: 0.1 + 2**-56}}, "FINISHED", "a at step 1: 0.1 then, 0.1 now"),
        ({"a": {1: 1.0, 2: 2.0}}, {"a": {1: 1.0}}, "FINISHED", "a at step 2: 2 then, nan now"),
        ({"a": {1: 1.0}}, {"a": {1: 1.0, 2: 2.0}}, "FINISHED", "a at step 2: nan then, 2 now"),
        ({"a": {1: 1.0}}, {"a": {1: 1.0, 2: 2.0}}, "KILLED", None),
        ({"a": {1: 1.0}, "fit_seconds": {1: 3.0}}, {"a": {1: 1.0}, "fit_seconds": {1: 4.0}}, "FINISHED", None),
        ({"a": {1: 1.0}, "system/cpu": {1: 3.0}}, {"a": {1: 1.0}, "system/cpu": {1: 4.0}}, "FINISHED", None),
    ],
)
def test_compare_finds_the_first_difference_and_no_other(home, then, now, status, difference):
    connect("compared")
    result = compare(logged(then, status), logged(now))
    assert result.same == (difference is None)
    assert "values of a are equal" in str(result) if result.same else f"first {difference}" in str(result)


def test_runs_without_a_metric_in_common_can_not_be_compared(home):
    connect("compared")
    with pytest.raises(DemoError, match="no metric in common"):
        compare(logged({"a": {1: 1.0}, "fit_seconds": {1: 1.0}}), logged({"b": {1: 1.0}, "fit_seconds": {1: 1.0}}))
