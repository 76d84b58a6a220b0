"""The classifier around a network: what it takes, what it returns, and that it needs neither pickle nor demo_lib."""

import subprocess
import sys

from demo_lib.config import TrainConfig
from demo_lib.data import CLASSES, load_data
from demo_lib.deploy.packaging import log_classifier, raw_images, reason
from demo_lib.model import build_model
from demo_lib.store import connect
from demo_lib.tracking import log_model
from demo_lib.training import predict

import mlflow
import numpy as np
import pytest
import torch

ALONE = """
import sys
sys.modules["demo_lib"] = None  # importing it fails
import mlflow, numpy
print(mlflow.pyfunc.load_model(sys.argv[1]).predict(numpy.zeros((3, 28, 28), numpy.uint8)).shape)
"""


@pytest.fixture
def network(home):
    """An untrained network, and the address under which it is logged."""
    connect("packaging")
    model = build_model(TrainConfig(channels=4)).eval()
    data = load_data(TrainConfig(train_images=200))
    with mlflow.start_run():
        yield model, log_model(model, "network", data.test.images[:2] / 255).model_uri


def test_the_classifier_names_the_networks_predictions(network):
    model, address = network
    split = load_data(TrainConfig(train_images=1200)).train  # more than one of its chunks
    frame = mlflow.pyfunc.load_model(log_classifier(address).model_uri).predict(raw_images(split))
    expected = predict(model, split).softmax(dim=1).numpy()
    assert list(frame) == ["label", *CLASSES]
    np.testing.assert_allclose(frame[list(CLASSES)], expected, atol=1e-6)
    assert list(frame["label"]) == [CLASSES[best] for best in expected.argmax(axis=1)]


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (np.zeros((2, 28, 28), np.float32), "dtype of input float32"),
        (np.zeros((2, 1, 28, 28), np.uint8), r"Shape of input \(2, 1, 28, 28\)"),
        (np.zeros((28, 28), np.uint8), r"Shape of input \(28, 28\)"),
    ],
)
def test_the_classifier_refuses_what_is_no_raw_image(network, images, reason):
    classifier = mlflow.pyfunc.load_model(log_classifier(network[1]).model_uri)
    assert len(classifier.predict(np.zeros((1, 28, 28), np.uint8))) == 1
    with pytest.raises(mlflow.MlflowException, match=reason):
        classifier.predict(images)


def test_the_classifier_takes_views_and_read_only_arrays(network, recwarn):
    classifier = mlflow.pyfunc.load_model(log_classifier(network[1]).model_uri)
    images = raw_images(load_data(TrainConfig(train_images=200)).validation)
    backwards = classifier.predict(images[::-1])
    images.flags.writeable = False
    assert list(classifier.predict(images).label) == list(backwards.label)[::-1]
    assert not [each for each in recwarn if "writable" in str(each.message)]


def test_models_load_on_the_cpu_also_on_a_machine_with_cuda(network, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = mlflow.pytorch.load_model(network[1])
    assert {weight.device.type for weight in loaded.state_dict().values()} == {"cpu"}
    classifier = mlflow.pyfunc.load_model(log_classifier(network[1]).model_uri)
    assert len(classifier.predict(np.zeros((2, 28, 28), np.uint8))) == 2


def test_the_classifier_loads_without_pickle_and_without_the_library(network, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    address = log_classifier(network[1]).model_uri
    done = subprocess.run([sys.executable, "-c", ALONE, address], capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "(3, 11)", done.stderr


def test_the_reason_is_what_follows_the_data_that_mlflow_repeats(network):
    with pytest.raises(mlflow.MlflowException) as refused:
        mlflow.pyfunc.load_model(network[1]).predict(np.zeros((2, 28, 28), np.float32))
    assert reason(refused.value) == "Shape of input (2, 28, 28) does not match expected shape (-1, 1, 28, 28)."


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError(), "ValueError"),
        (RuntimeError("two\nlines"), "two"),
        ("Invalid input. Error: 'at char 0'\nInput: b'x'", "Invalid input. Error: 'at char 0'"),
        ("word " * 100, ("word " * 39).strip() + " ..."),
    ],
)
def test_the_reason_is_one_line_of_whole_words(error, text):
    assert reason(error) == text
