"""Several processes that train together, as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

from demo_lib.__main__ import main
from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import load_data
from demo_lib.ops.reproduce import differences
from demo_lib.parallel import joined
from demo_lib.store import connect, open_store

import mlflow
import pytest
import torch

from tests.tools.processes import PATIENCE, find_processes, normal_signals, wait_until

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
# Of 64 images, a batch is 22, 21 and 21 for three processes; the last one, of 1 image, leaves two of them without any.
CONFIG = TrainConfig(
    train_images=210, epochs=2, batch_size=64, channels=4, dropout=0.3, flip=True, log_every=1, device="cpu"
)
TRAINING = """
import json, sys
from demo_lib import training
from demo_lib.config import TrainConfig
from demo_lib.data import batches, load_data
from demo_lib.model import build_model
from demo_lib.parallel import joined
import torch

config, folder = TrainConfig(**json.loads(sys.argv[1])), sys.argv[2]
training._has_bfloat16 = lambda device: False
data, seen = load_data(config), []

def in_float64(module, given):
    if module.training:
        seen.extend((given[0] * 255).round().sum((1, 2, 3)).long().tolist())
    return given[0].double()

with joined(torch.device("cpu"), config.batch_size) as rank:
    model = build_model(config).double()
    model.register_forward_pre_hook(in_float64)
    metrics = [record.metrics for record in training.fit(model, data, config)]
    model = build_model(config)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    images, labels = next(batches(data.train, config.batch_size))
    loss = training._step(model, images, labels, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))
    step = torch.cat([value.grad.flatten() for value in model.parameters()]).tolist()
    step += [value for name, buffer in model.named_buffers() if "running" in name for value in buffer.tolist()]
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump({"metrics": metrics, "seen": seen, "loss": loss.item(), "step": step}, file)
"""


def results(template, folder, count):
    """Train with so many processes, and return what each of them found."""
    script = folder / "training.py"
    script.write_text(TRAINING)
    command = [*TORCHRUN, str(count)] if count > 1 else [sys.executable]
    command += [script, CONFIG.model_dump_json(), folder]
    subprocess.run(command, check=True, env=os.environ | {"DEMO_HOME": str(template)}, timeout=PATIENCE)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def alone(template, tmp_path_factory):
    return results(template, tmp_path_factory.mktemp("alone"), 1)[0]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_train_as_one_does(template, home, alone, tmp_path, count):
    assert len(load_data(CONFIG).train) % CONFIG.batch_size == 1
    found = results(template, tmp_path, count)
    assert all(each["metrics"] == found[0]["metrics"] for each in found)  # to the bit: all of them go the same way
    for one, several in zip(alone["metrics"], found[0]["metrics"], strict=True):
        assert several == pytest.approx(one, rel=1e-9)
    used = sum((Counter(each["seen"]) for each in found), Counter())
    once = Counter(load_data(CONFIG).train.images.long().sum((1, 2, 3)).tolist())
    assert used == Counter({image: times * CONFIG.epochs for image, times in once.items()})
    # In float32 a step's loss, its gradients and batch norm's statistics.
    assert sum(each["loss"] for each in found) == pytest.approx(alone["loss"], rel=1e-6)
    assert found[0]["step"] == pytest.approx(alone["step"], rel=1e-4, abs=1e-5)


def start(home, *options, count=2):
    """Start `demo_lib train` with so many processes, Ctrl-C as in a terminal."""
    command = [*TORCHRUN, str(count), "-m", "demo_lib", "train", "--device", "cpu", *options]
    return subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True, preexec_fn=normal_signals)


def runs():
    open_store()
    return mlflow.search_runs(search_all_experiments=True, output_format="list")


def test_the_first_process_alone_tracks(home):
    process = start(home, "--train-images", "200", "--epochs", "1")
    said = process.communicate(timeout=PATIENCE)[0]
    (run,) = runs()
    assert process.returncode == 0 and run.info.status == "FINISHED"
    assert run.data.tags["processes"] == "2"
    assert {"train_loss", "val_loss", "test_accuracy", "fit_seconds"} <= run.data.metrics.keys()
    assert said.count(f"run {run.info.run_id}") == said.count("test accuracy") == 1
    assert "processes: 2 trained together then, one does here: other rounding" in differences(run)


ENDS = {
    "a process is killed": ("1", signal.SIGKILL, "FAILED", "another process of this training is gone|by torchrun"),
    "Ctrl-C": (None, signal.SIGINT, "KILLED", "KeyboardInterrupt"),
    "torchrun is told to stop": (None, signal.SIGTERM, "FAILED", "torchrun itself was told to stop|is gone"),
    "the first process is killed": ("0", signal.SIGKILL, "KILLED", "its process ended without closing the run"),
}


@pytest.mark.parametrize(
    "end", [*list(ENDS)[:2], *(pytest.param(each, marks=pytest.mark.slow) for each in [*ENDS][2:])]
)
def test_how_a_training_ends(home, end):
    rank, signum, status, reason = ENDS[end]
    marks = {"DEMO_HOME": str(home), "TORCHELASTIC_RUN_ID": None}
    process = start(home, "--train-images", "4000", "--epochs", "100")
    try:
        wait_until(lambda: any("train_loss" in run.data.metrics for run in runs()))
        if rank is None:
            process.send_signal(signum)
        else:
            (pid,) = find_processes(marks | {"RANK": rank}, "demo_lib train")
            os.kill(pid, signum)
        process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode != 0
    wait_until(lambda: not find_processes(marks, "demo_lib train"))
    connect("train")
    (run,) = runs()
    assert run.info.status == status
    assert [each for each in reason.split("|") if each in run.data.tags["error"]], run.data.tags["error"]


def test_processes_with_other_options_are_refused(home):
    command = f"exec '{sys.executable}' -m demo_lib train --device cpu --train-images 200 --seed $RANK"
    done = subprocess.run(
        [*TORCHRUN, "2", "--no-python", "sh", "-c", command], capture_output=True, text=True, cwd=home
    )
    sentence = "the processes of torchrun differ in their configuration: give all of them the same."
    (run,) = runs()
    assert done.returncode != 0 and f"error: {sentence}" in done.stderr
    assert run.info.status == "FAILED" and sentence in run.data.tags["error"]


@pytest.fixture
def under_torchrun(monkeypatch):
    """Make this process look like the first of some that torchrun started on this machine."""

    def call(count):
        given = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "RANK": 0, "LOCAL_RANK": 0}
        for name, value in given.items():
            monkeypatch.setenv(name, str(value))

    return call


def test_a_batch_too_small_for_the_processes_is_refused(home, under_torchrun, capsys):
    under_torchrun(9)
    assert main(["train", "--batch-size", "8", "--device", "cpu"]) == 2
    assert "batch_size = 8 leaves some of the 9 processes without images: raise it." in capsys.readouterr().err


def test_other_commands_are_refused_under_torchrun(home, under_torchrun, capsys):
    under_torchrun(2)
    assert main(["tune", "--workers", "2"]) == 2
    assert "torchrun is for `train`: start this command without it." in capsys.readouterr().err


def test_devices_that_processes_cannot_share_are_refused(under_torchrun, monkeypatch):
    under_torchrun(2)
    with (
        pytest.raises(DemoError, match="can't train together on mps: add --device cpu"),
        joined(torch.device("mps"), 64),
    ):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    sentence = "2 processes need a GPU each, and this machine has 1: give --nproc-per-node 1, or --device cpu"
    with pytest.raises(DemoError, match=sentence), joined(torch.device("cuda"), 64):
        pass
