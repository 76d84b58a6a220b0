"""Measures of training: imports, batches, an epoch, and how long an accuracy takes."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from demo_lib.config import LESSONS, TrainConfig, read_yaml
from demo_lib.data import Split, batches, load_data
from demo_lib.model import MEAN, STD, FashionNet, build_model
from demo_lib.training import evaluate, fit, pick_device

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms

from tests.benchmarks.rows import Row, in_turns, seconds

EPOCH_IMAGES = 12_000  # a fifth of an epoch
QUICK = TrainConfig(train_images=60_000, epochs=2, log_every=50)
FULL = TrainConfig(**read_yaml(LESSONS / "params" / "full.yaml"))


def usual_dataset() -> datasets.FashionMNIST:
    """Return the training images as PyTorch's tutorials read them: one by one, from a picture to a tensor."""
    steps = [transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))]
    return datasets.FashionMNIST(os.environ["DEMO_DATA_DIR"], train=True, transform=transforms.Compose(steps))


def usual_loader(dataset: Dataset) -> DataLoader:
    """Return the loader of the original demo."""
    return DataLoader(dataset, batch_size=64, shuffle=True, num_workers=0)


def measure_imports() -> Iterator[Row]:
    """The library in a new Python."""
    modules = [f"demo_lib.{name}" for name in ("data", "model", "training", "tracking", "tuning", "runs", "plots")]
    spared = ["torchvision", "sklearn.model_selection", "mlflow.store.tracking.sqlalchemy_store"]
    yield Row("imports", *in_turns(lambda: import_seconds(*spared, *modules), lambda: import_seconds(*modules)))


def import_seconds(*modules: str) -> float:
    """Return how long a new Python takes to import the modules."""
    code = f"import time; t = time.perf_counter(); import {', '.join(modules)}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def measure_batches() -> Iterator[Row]:
    """One pass over all images; ours leaves the normalization, two operations a batch, to the network."""
    data, dataset = load_data(TrainConfig(train_images=60_000)), usual_dataset()
    parts = (data.train, data.validation, data.gate)
    whole = Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    floats = whole.images.float()
    assert len(whole) == 60_000

    def read(pairs: Iterator) -> None:
        count = sum(len(labels) for _, labels in pairs)
        assert count == len(whole), f"{count} images were read"

    def ours() -> float:
        generator = torch.Generator().manual_seed(0)
        return statistics.median(seconds(read, batches(whole, 128, generator)) for _ in range(10))  # hundredths of 1 s

    usual, copied, passed = in_turns(
        lambda: seconds(read, iter(usual_loader(dataset))),
        lambda: statistics.median(seconds(floats.clone) for _ in range(10)),
        ours,
    )
    yield Row("batches", usual, passed)
    yield Row("copy", copied, passed)


def measure_epoch() -> Iterator[Row]:
    """An epoch, validation included, of the same network on as many images."""
    config = TrainConfig(train_images=EPOCH_IMAGES, epochs=1)
    data, dataset = load_data(config), usual_dataset()
    count = len(data.train)
    train, validation = Subset(dataset, range(count)), Subset(dataset, range(count, EPOCH_IMAGES))
    warm_up()
    baseline, ours = in_turns(
        lambda: seconds(usual_epoch, build_model(config), train, validation),
        lambda: seconds(list, fit(build_model(config), data, config)),
    )
    yield Row("epoch", baseline, ours)


def warm_up() -> None:
    """Train a little: PyTorch prepares its kernels at their first use."""
    config = TrainConfig(train_images=600, epochs=1)
    for _ in fit(build_model(config), load_data(config), config):
        pass


def usual_epoch(model: FashionNet, train: Dataset, validation: Dataset) -> None:
    """Train for an epoch as PyTorch's tutorials do, in float32 with Adam, then validate."""
    device = pick_device(TrainConfig())
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for images, labels in usual_loader(train):
        loss = F.cross_entropy(_logits(model, images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    model.eval()
    with torch.no_grad():
        for images, labels in usual_loader(validation):
            (_logits(model, images.to(device)).argmax(dim=1).cpu() == labels).sum().item()


def _logits(model: FashionNet, images: torch.Tensor) -> torch.Tensor:
    """Apply the network to images that are normalized already."""
    return model.classifier(model.features(images))


def measure_accuracy() -> Iterator[Row]:
    """Whole trainings, once each; the weights are chosen on the validation images and scored once on the test images.

    The learning rate's schedule ends with the training, so that no accuracy can be had before its end.
    """
    warm_up()
    for name, config in {"quick": QUICK, "full": FULL}.items():
        data, model, best = load_data(config), build_model(config), None
        started = time.perf_counter()
        for record in fit(model, data, config):
            best = record if record.weights else best
        yield Row(name, [], [time.perf_counter() - started])
        model.load_state_dict(best.weights)
        yield Row(f"{name} accuracy", [], [100 * evaluate(model, data.test)["accuracy"]])
