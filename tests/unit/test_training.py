"""The network and its training."""

import os
import subprocess
import sys

from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import load_data
from demo_lib.model import build_model
from demo_lib.training import evaluate, fit, pick_device, predict

import pytest
import torch

CONFIG = TrainConfig(train_images=1_000, epochs=3, batch_size=64, log_every=4, device="cpu")


@pytest.fixture
def data(home):
    return load_data(CONFIG)


def history(data, config=CONFIG):
    return list(fit(build_model(config), data, config))


@pytest.mark.parametrize("changed", [{}, {"flip": True, "dropout": 0.3}])
def test_same_configuration_and_data_give_the_same_metrics_to_the_bit(home, changed):
    config = TrainConfig(train_images=400, epochs=2, channels=8, device="cpu", **changed)
    data = load_data(config)
    first, second = history(data, config), history(data, config)
    assert [record.metrics for record in first] == [record.metrics for record in second]
    other = TrainConfig(**config.model_dump() | {"seed": 1})
    assert history(data, other)[-1].metrics != first[-1].metrics


def test_steps_rise_over_epochs_and_validation_comes_once_an_epoch(data):
    records = history(data)
    steps_per_epoch = -(-len(data.train) // CONFIG.batch_size)
    steps = [record.step for record in records]
    assert steps == sorted(set(steps))
    validated = [(record.epoch, record.step) for record in records if "val_loss" in record.metrics]
    assert validated == [(epoch, epoch * steps_per_epoch) for epoch in (1, 2, 3)]
    assert {step for step in steps if step % steps_per_epoch} == {
        step for step in range(4, 3 * steps_per_epoch, 4) if step % steps_per_epoch
    }
    assert all("train_loss" in record.metrics for record in records)


def test_the_best_weights_reproduce_the_best_validation(data):
    records = history(data)
    best = max(record.metrics["val_accuracy"] for record in records if "val_accuracy" in record.metrics)
    weights = [record.weights for record in records if record.weights][-1]
    model = build_model(CONFIG)
    model.load_state_dict(weights)
    assert evaluate(model, data.validation)["accuracy"] == best


def test_it_learns(data):
    model = build_model(CONFIG)
    untrained = evaluate(model, data.test)["accuracy"]
    list(fit(model, data, CONFIG))
    assert untrained < 0.3 < 0.65 < evaluate(model, data.test)["accuracy"]


def test_the_smallest_allowed_training_works(home):
    config = TrainConfig(train_images=200, epochs=1, batch_size=4096, log_every=10_000, device="cpu")
    assert len(history(load_data(config), config)) == 1


def test_predicting_changes_nothing(data):
    model = build_model(CONFIG).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits = predict(model, data.validation)
    assert logits.shape == (len(data.validation), 10) and logits.dtype == torch.float32
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_device_that_is_not_there_is_refused():
    missing = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(DemoError, match=f"device = '{missing}' is not on this machine: choose auto or one of"):
        pick_device(TrainConfig(device=missing))
    assert pick_device(TrainConfig()).type in ("cpu", "cuda", "mps")


def test_the_weights_depend_on_the_seed_alone():
    torch.rand(3)
    first = build_model(TrainConfig(seed=5)).state_dict()
    assert all(torch.equal(value, first[name]) for name, value in build_model(TrainConfig(seed=5)).state_dict().items())


def test_a_container_with_few_cores_gets_as_many_threads():
    code = "import demo_lib.training, torch; print(torch.get_num_threads())"
    environment = os.environ | {
        "OMP_NUM_THREADS": "6",
        "LOKY_MAX_CPU_COUNT": "1",
    }  # joblib takes it for the container's
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "1\n"
