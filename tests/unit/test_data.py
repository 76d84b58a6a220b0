"""Fashion-MNIST: where it is looked for, what is refused, and the splits."""

import gzip
import hashlib
import shutil
import tempfile
from pathlib import Path

from demo_lib import data as data_module
from demo_lib.config import DemoError, TrainConfig
from demo_lib.data import (
    ADDRESS,
    CLASSES,
    RAW,
    SAMPLE,
    SAMPLE_SHA256,
    FashionData,
    Split,
    batches,
    find_data,
    load_data,
)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import datasets

from tests.tools.packages import missing


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """A home without data on a machine without Debian's package."""
    monkeypatch.setenv("DEMO_HOME", str(tmp_path))
    monkeypatch.setattr(data_module, "DEBIAN", tmp_path / "no-package")
    return tmp_path


@pytest.fixture
def as_full(monkeypatch):
    """Take the sample for the whole set, so that copies of it are small and can be damaged."""
    monkeypatch.setattr(data_module, "FULL_SHA256", SAMPLE_SHA256)


@pytest.fixture
def package(empty, monkeypatch, as_full):
    """Debian's package with the sample as its whole set, and no cache."""
    folder = empty / "package"
    shutil.copytree(SAMPLE, folder)
    monkeypatch.setattr(data_module, "DEBIAN", folder)
    return folder


def test_the_package_is_read_where_it_lies_unless_there_is_a_cache(empty, package):
    assert (find_data().source, find_data().name) == ("Debian's package", "fashion-mnist")
    assert not (empty / "data").exists()
    shutil.copytree(SAMPLE, empty / "data" / RAW)
    assert find_data().source == "the cache"


def test_the_real_package_has_the_originals(tmp_path, monkeypatch):
    if not data_module.DEBIAN.is_dir():
        missing("dataset-fashion-mnist")
    monkeypatch.setenv("DEMO_HOME", str(tmp_path))
    data = load_data(TrainConfig(train_images=60_000))
    sizes = [len(split) for split in (data.train, data.validation, data.gate, data.test)]
    assert (data.name, sizes) == ("fashion-mnist", [50_417, 4_583, 5_000, 10_000])


def test_without_anything_the_sample_is_used_and_named(empty):
    data = load_data(TrainConfig(train_images=60_000))
    assert data.name == "fashion-mnist-sample"
    assert "NOT the whole set" in data.source and "NOT the whole set" in str(data)
    assert len(data.train) + len(data.validation) + len(data.gate) == 7_800
    assert data.test.labels.bincount().tolist() == [200] * 10


def test_the_sample_is_part_of_the_real_set(template, monkeypatch):
    monkeypatch.setenv("DEMO_HOME", str(template))
    if find_data().name != "fashion-mnist":
        missing("dataset-fashion-mnist")
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        whole = np.fromfile(template / "data" / RAW / name, np.uint8)[16:].reshape(-1, 784)
        sample = np.frombuffer(gzip.decompress((SAMPLE / f"{name}.gz").read_bytes()), np.uint8)[16:].reshape(-1, 784)
        assert {row.tobytes() for row in sample} <= {row.tobytes() for row in whole}


def test_the_sample_is_small_and_whole():
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 5_000_000
    for name, expected in SAMPLE_SHA256.items():
        assert hashlib.sha256(gzip.decompress((SAMPLE / f"{name}.gz").read_bytes())).hexdigest() == expected


@pytest.mark.parametrize("layout", ["torchvision", "loose", "gz"])
def test_a_named_folder_is_taken_in_any_layout(empty, monkeypatch, as_full, layout):
    folder = empty / "mine"
    target = folder / RAW if layout == "torchvision" else folder
    target.mkdir(parents=True)
    for path in SAMPLE.glob("*.gz"):
        content = path.read_bytes()
        if layout == "gz":
            (target / path.name).write_bytes(content)
        else:
            (target / path.stem).write_bytes(gzip.decompress(content))
    monkeypatch.setenv("DEMO_DATA_DIR", str(folder))
    source = find_data()
    assert (source.source, source.name, len(source.train)) == (f"folder {folder}", "fashion-mnist", 7_800)
    assert not (empty / "data").exists()


def test_a_named_folder_without_data_is_refused(empty, monkeypatch):
    monkeypatch.setenv("DEMO_DATA_DIR", str(empty))
    with pytest.raises(DemoError, match="has no train-images-idx3-ubyte"):
        find_data()
    assert not list((empty / "data").rglob("*ubyte"))


@pytest.mark.parametrize("damage", ["truncated", "altered", "not gzip"])
def test_a_damaged_file_is_named_with_the_repair(package, damage):
    victim = package / "t10k-images-idx3-ubyte.gz"
    content = gzip.decompress(victim.read_bytes())
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1000])
    elif damage == "altered":
        victim.write_bytes(gzip.compress(content[:-1] + b"\x07"))
    else:
        victim.write_bytes(content)
    with pytest.raises(DemoError, match="replace it by a good copy, or delete the cache") as error:
        find_data()
    assert str(victim) in str(error.value)


def test_a_cache_that_cannot_be_written_leaves_the_sample(empty, monkeypatch):
    monkeypatch.setenv("DEMO_DOWNLOAD", "true")
    (empty / "data").touch()
    assert find_data().name == "fashion-mnist-sample"


def test_what_torchvision_downloads_fills_the_cache(empty, monkeypatch, as_full):
    monkeypatch.setenv("DEMO_DOWNLOAD", "true")
    monkeypatch.setattr(datasets, "FashionMNIST", lambda root, download: shutil.copytree(SAMPLE, Path(root) / RAW))
    for _ in range(2):  # the second time from the cache
        assert (find_data().source, find_data().name) == ("the cache", "fashion-mnist")
        monkeypatch.setattr(datasets, "FashionMNIST", None)
    assert not list((empty / "data").glob(".download*"))


def test_a_failed_download_falls_back_and_leaves_nothing(empty, monkeypatch):
    def half(root, download):
        folder = Path(root, RAW)
        folder.mkdir(parents=True)
        (folder / "train-images-idx3-ubyte.gz").write_bytes(b"half")
        raise OSError("network unreachable")

    monkeypatch.setenv("DEMO_DOWNLOAD", "true")
    monkeypatch.setattr(datasets, "FashionMNIST", half)
    assert find_data().name == "fashion-mnist-sample"
    assert not (empty / "data" / RAW).exists()
    assert not list((empty / "data").glob(".download*"))


@pytest.fixture(scope="module")
def known():
    """The sample, as torchvision reads it."""
    with tempfile.TemporaryDirectory() as root:
        raw = Path(root, RAW)
        raw.mkdir(parents=True)
        for path in SAMPLE.glob("*.gz"):
            (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        return {part: datasets.FashionMNIST(root, train=part == "train") for part in ("train", "t10k")}


def test_files_classes_and_address_are_those_of_torchvision(empty, known):
    source = find_data()
    for split, dataset in ((source.train, known["train"]), (source.test, known["t10k"])):
        assert torch.equal(split.images, dataset.data.unsqueeze(1))
        assert torch.equal(split.labels, dataset.targets)
    assert (list(CLASSES), [ADDRESS]) == (datasets.FashionMNIST.classes, datasets.FashionMNIST.mirrors)


@settings(max_examples=50, deadline=None)
@given(train_images=st.integers(200, 60_000), seed=st.integers(0, 2**31 - 1))
def test_splits_are_stratified_fixed_and_never_overlap(train_images, seed):
    numbered = Split(torch.arange(60_000), torch.arange(60_000) % 10)
    source = FashionData(numbered, numbered, numbered, numbered, name="", source="", digest="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "find_data", lambda: source)
        config = TrainConfig(train_images=train_images, seed=seed)
        data, again = load_data(config), load_data(config)
        other = load_data(TrainConfig(seed=seed // 2 + 1))
    splits = (data.train, data.validation, data.gate)
    size = min(train_images, 55_000)
    assert [len(split) for split in splits] == [size - size // 12, size // 12, 5_000]
    assert len(set(torch.cat([split.images for split in splits]).tolist())) == size + 5_000
    for split, same in zip(splits, (again.train, again.validation, other.gate), strict=True):
        assert torch.equal(split.images, same.images)
        counts = split.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1


def test_one_seed_validates_no_size_on_what_it_trains_another_with(empty):
    sizes = [load_data(TrainConfig(train_images=size)) for size in (200, 3_000, 7_800)]
    trained = {image.numpy().tobytes() for data in sizes for image in data.train.images}
    assert not [image for data in sizes for image in data.validation.images if image.numpy().tobytes() in trained]


def test_another_seed_is_another_split(empty):
    first, second = (load_data(TrainConfig(train_images=7_800, seed=seed)).validation for seed in (0, 1))
    shared = {image.numpy().tobytes() for image in first.images} & {image.numpy().tobytes() for image in second.images}
    assert len(shared) < 0.2 * len(first)


def numbered_split(size):
    return Split(torch.arange(size, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28), torch.arange(size))


@given(size=st.integers(1, 200), batch_size=st.integers(1, 64), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_batches_hold_every_image_once(size, batch_size, seed):
    split = numbered_split(size)
    seen = list(batches(split, batch_size, torch.Generator().manual_seed(seed)))
    labels = torch.cat([labels for _, labels in seen])
    images = torch.cat([images for images, _ in seen])
    assert sorted(labels.tolist()) == list(range(size))
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
    assert images.dtype == torch.float32 and images.max() <= 1


def test_flip_mirrors_about_half_of_the_images():
    images = torch.zeros(1000, 1, 28, 28, dtype=torch.uint8)
    images[..., 0] = 255
    flipped, _ = next(batches(Split(images, torch.zeros(1000)), 1000, torch.Generator().manual_seed(0), flip=True))
    assert 400 < flipped[:, 0, 0, -1].sum() < 600
    assert torch.equal(flipped.sum(dim=(1, 2, 3)), torch.full((1000,), 28.0))
