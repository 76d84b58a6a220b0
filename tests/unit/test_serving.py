"""The scoring server answers as the model does, refuses wrong input, and is gone with whoever started it."""

import signal
import subprocess
import sys

from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import CLASSES, Split, batches, load_data
from demo_lib.deploy.packaging import log_classifier, raw_images
from demo_lib.deploy.serving import serve
from demo_lib.model import build_model
from demo_lib.ops import processes
from demo_lib.ops.guard import alive
from demo_lib.store import connect, open_store
from demo_lib.tracking import log_model
from demo_lib.training import fit, predict

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import requests
import torch

from tests.tools.processes import normal_signals, scoring_servers, wait_until

URI = "models:/served@champion"
HOLD = f"""
import time
from threading import Thread
from demo_lib.deploy.serving import serve
def hold():
    global server
    server = serve({URI!r})
START
print(server.url, flush=True)
time.sleep(300)
"""
STARTS = {"main": "hold()", "ended": "thread = Thread(target=hold); thread.start(); thread.join(); time.sleep(2)"}


@pytest.fixture(scope="module")
def served(template, tmp_path_factory):
    """A home with a small champion; gives its network in memory, test images, and the logged network's address."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "data").symlink_to(template / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEMO_HOME", str(folder))
        connect("served")
        config = TrainConfig(train_images=1_500, epochs=3, channels=8)
        data, network = load_data(config), build_model(config)
        for _ in fit(network, data, config):
            pass
        with mlflow.start_run():
            network_uri = log_model(network, "network", next(batches(data.test, 2))[0]).model_uri
            classifier = log_classifier(network_uri)
        version = mlflow.register_model(classifier.model_uri, "served")
        mlflow.MlflowClient().set_registered_model_alias("served", "champion", version.version)
        yield folder, network, Split(data.test.images[:100], data.test.labels[:100]), network_uri


@pytest.fixture(scope="module")
def server(served):
    open_store()
    with serve(URI) as running:
        yield running
    assert not scoring_servers(served[0])


@pytest.fixture(autouse=True)
def store(served):
    open_store()


def ask(server, body):
    return requests.post(f"{server.url}/invocations", json=body)


def probabilities(answer):
    return pd.DataFrame(answer.json()["predictions"])[list(CLASSES)].to_numpy()


def test_memory_pt2_pyfunc_and_http_give_the_same_predictions(served, server):
    _, network, split, network_uri = served
    expected = predict(network, split).softmax(dim=1).numpy()
    classifier = mlflow.pyfunc.load_model(URI)
    pt2 = mlflow.pytorch.load_model(network_uri)
    with torch.inference_mode():
        loaded = pt2(split.images / 255).softmax(dim=1).numpy()
    images = raw_images(split)
    frame = classifier.predict(images)
    answer = ask(server, {"inputs": images.tolist()})
    for found in (loaded, frame[list(CLASSES)].to_numpy(), probabilities(answer)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    labels = [CLASSES[best] for best in expected.argmax(axis=1)]
    assert len(set(labels)) > 3
    assert labels == frame.label.tolist() == [row["label"] for row in answer.json()["predictions"]]


def test_the_four_input_formats_give_the_same(served, server):
    images = raw_images(served[2])[:5]
    flat = images.reshape(5, -1).tolist()
    bodies = [
        {"inputs": images.tolist()},
        {"instances": images.tolist()},
        {"dataframe_split": {"columns": ["image"], "data": [[pixels] for pixels in flat]}},
        {"dataframe_records": [{"image": pixels} for pixels in flat]},
    ]
    first, *others = [probabilities(ask(server, body)) for body in bodies]
    assert first.shape == (5, 10) and all((other == first).all() for other in others)


@pytest.mark.parametrize(
    "body, words",
    [
        ({"images": [[0]]}, "exactly one of the input fields"),
        ({"inputs": np.zeros((1, 14, 28), int).tolist()}, "(1, 14, 28) does not match expected shape (-1, 28, 28)"),
        ({"inputs": np.full((1, 28, 28), 300).tolist()}, "300 out of bounds for uint8"),
        ("an ankle boot", "exactly one of the input fields"),
    ],
)
def test_wrong_input_is_refused_with_the_reason(server, body, words):
    answer = ask(server, body)
    assert answer.status_code == 400 and words in answer.json()["message"]


def test_scaled_pixels_pass_as_zeros(served, server):
    images = raw_images(served[2])[:2]
    scaled, zeros = (ask(server, {"inputs": each.tolist()}) for each in (images // 2 / 255, images * 0))
    assert scaled.status_code == 200 and (probabilities(scaled) == probabilities(zeros)).all()


@pytest.mark.slow
def test_no_server_outlives_its_process(served):
    """Ctrl-C, SIGTERM and SIGKILL at once, as each server takes seconds to start, also by a thread that has ended."""
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    scripts = {}
    for end, thread in (("SIGINT", "main"), ("SIGTERM", "main"), ("SIGKILL", "main"), ("SIGKILL", "ended")):
        command = [sys.executable, "-c", HOLD.replace("START", STARTS[thread])]
        scripts[end, thread] = subprocess.Popen(command, preexec_fn=normal_signals, **quiet)
    for (end, _), script in scripts.items():
        url = script.stdout.readline().strip()
        assert requests.get(f"{url}/health").status_code == 200
        script.send_signal(getattr(signal, end))
        script.wait(30)
        with script.stdout:
            wait_until(lambda url=url: refuses(url))


def refuses(url):
    try:
        requests.get(f"{url}/health", timeout=2)
    except requests.ConnectionError:
        return True
    return False


def children():
    return set(psutil.Process().children(recursive=True))


def all_started(before):
    wait_until(lambda: len(children() - before) >= 3)  # the guard, MLflow, and the server that it starts
    return children() - before


def test_an_interrupt_while_the_server_starts_ends_it(monkeypatch):
    before, started = children(), []

    def interrupt(*arguments):
        started.extend(all_started(before))
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "wait_for_health", interrupt)
    with pytest.raises(KeyboardInterrupt):
        serve(URI)
    assert started and not any(map(alive, started))


def test_a_server_that_nothing_refers_to_is_ended(monkeypatch):
    before = children()
    monkeypatch.setattr(processes, "wait_for_health", lambda *arguments: None)
    server = serve(URI)
    started = all_started(before)
    del server
    assert not any(map(alive, started))


@pytest.mark.parametrize(
    "uri, seconds, words",
    [
        ("served", 60, "ended before it answered; its log ends: .*'served'"),
        ("models:/served@nobody", 60, "ended before it answered; its log ends: .*alias nobody not found"),
        (URI, 0.2, "does not answer after 0.2 s"),
    ],
)
def test_a_server_that_does_not_come_up_is_explained_and_ended(uri, seconds, words):
    before = children()
    with pytest.raises(DemoError, match=words) as caught:
        serve(uri, seconds)
    assert uri in str(caught.value) and "\n" not in str(caught.value)
    assert children() == before
