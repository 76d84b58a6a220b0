"""Fashion-MNIST as tensors in memory: found on this machine or fetched, checked, split and batched."""

import gzip
import hashlib
import os
import socket
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from demo_lib.config import DemoError, TrainConfig, settings

import torch
from torch import Tensor

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # Zalando's own
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = Path(__file__).parent / "sample"
# Part of the digest, by which the gate knows that a model has not seen its images: change it with the code.
SPLIT = "classes in turn, the last twelfth held out, of each class a twelfth for the gate"
RAW = Path("FashionMNIST", "raw")  # where torchvision's class looks below its root

# SHA-256 of the four files, uncompressed: Zalando's originals, and the stratified sample that ships with the library.
FULL_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SAMPLE_SHA256 = {
    "train-images-idx3-ubyte": "7e79dc3d496fd91fef43159defe6e6d13a07b030d995e1209a7d2ee27dfa360e",
    "train-labels-idx1-ubyte": "a9c6435b5d5d227e25e6f55d8b0314198a0c7d773c7d2a100499b75d1e92e588",
    "t10k-images-idx3-ubyte": "15a92dd1e9b16ea361928086e77df4dfa890c255c00b5a8c8162c1040ce8eef1",
    "t10k-labels-idx1-ubyte": "234596aeb6eb48133ec99a62541f90bc0728c9559a681f1e0638037462458f2c",
}


@dataclass(frozen=True)
class Split:
    """Images as uint8 of shape (N, 1, 28, 28), pixel values 0 to 255, and labels as int64 of shape (N,), 0 to 9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        """Return the split on the device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class FashionData:
    """The splits, what they are a part of (`name`), where they were read (`source`), `digest` of files and split."""

    train: Split
    validation: Split
    gate: Split
    test: Split
    name: str
    source: str
    digest: str

    def __str__(self) -> str:
        sizes = f"{len(self.train):,} training, {len(self.validation):,} validation, {len(self.test):,} test images"
        return f"{self.name} from {self.source}: {sizes} (digest {self.digest})"


def load_data(config: TrainConfig | None = None) -> FashionData:
    """Find Fashion-MNIST and return its splits, fixed by `config.seed` and `train_images`, stratified by class.

    A twelfth of the training images, the same for every configuration, is the gate split: no network is trained or
    chosen on it. Of the others as many as the configuration asks for, a twelfth of these for validation. The test split
    is always whole. With the same seed, what is for validation at one `train_images` is never for training at another.
    Errors are those of `find_data`.
    """
    config, whole = config or TrainConfig(), find_data()
    images, labels = whole.train.images, whole.train.labels
    members = labels.argsort(stable=True).view(len(CLASSES), -1)  # one row a class: each has equally many images
    kept = members.shape[1] // 12
    others, gate = members[:, :-kept], members[:, -kept:]
    drawn = torch.rand(others.shape, generator=torch.Generator().manual_seed(config.seed)).argsort(dim=1, stable=True)
    order = others.gather(1, drawn).T.flatten()  # the classes in turn: any stretch has each as often, give or take one
    held_out = (size := min(config.train_images, len(order))) // 12
    parts = order[: size - held_out], order[-held_out:], gate.T.flatten()
    train, validation, gated = (Split(images[part], labels[part]) for part in parts)
    return replace(whole, train=train, validation=validation, gate=gated)


def batches(
    split: Split, batch_size: int, generator: torch.Generator | None = None, flip: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images as float32 in [0, 1], shape (B, 1, 28, 28), with their labels.

    Each batch is one index selection from memory on the split's device; a generator on the CPU shuffles, so that the
    order is the same on every device. With `flip` each image is mirrored with probability 1/2.
    """
    device = split.labels.device
    order = torch.arange(len(split)) if generator is None else torch.randperm(len(split), generator=generator)
    for index in order.split(batch_size):
        images = split.images[index.to(device)].float().div_(255)
        if flip:
            mirrored = torch.rand(len(index), generator=generator) < 0.5
            images = torch.where(mirrored.to(device).view(-1, 1, 1, 1), images.flip(-1), images)
        yield images, split.labels[index.to(device)]


def find_data(download: bool = True) -> FashionData:
    """Return the first of: DEMO_DATA_DIR, the cache, Debian's package, torchvision's download, the shipped sample.

    There is no download if `download` or DEMO_DOWNLOAD is false. The data is not split yet: all its training images are
    in `train`. Every file is checked against its SHA-256; one that is missing, damaged or unreadable is a DemoError.
    """
    options, cache = settings(), settings().home / "data"
    if options.data_dir:
        return _read(f"folder {options.data_dir}", options.data_dir)
    cached = (cache / RAW).is_dir() and any((cache / RAW).iterdir())
    if not cached and DEBIAN.is_dir():
        return _read("Debian's package", DEBIAN)
    if cached or (download and options.download and _download(cache)):
        return _read("the cache", cache)
    return _read("the shipped sample of 9,800 images, NOT the whole set", SAMPLE)


def _download(cache: Path) -> bool:
    """Let torchvision download the files to the cache, whole or not at all; whether they are there then."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(5)
    try:
        from torchvision.datasets import FashionMNIST  # here only: it takes seconds to load

        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            FashionMNIST(folder, download=True)
            (cache / RAW).parent.mkdir(exist_ok=True)
            Path(folder, RAW).rename(cache / RAW)
    except (OSError, RuntimeError):  # no network, no room, or another process was faster
        pass
    finally:
        socket.setdefaulttimeout(before)
    return (cache / RAW).is_dir()


def _read(source: str, folder: Path) -> FashionData:
    """Read the files and check them; an IDX file is a short header, of 16 or 8 bytes, and the tensor's bytes."""
    name, sha256 = ("fashion-mnist-sample", SAMPLE_SHA256) if folder == SAMPLE else ("fashion-mnist", FULL_SHA256)
    repair = "replace it by a good copy, or delete the cache if it is in one"
    found = []
    for file, expected in sha256.items():
        places = [folder / RAW / file, folder / file, folder / f"{file}.gz", folder / RAW / f"{file}.gz"]
        if (path := next(filter(os.path.isfile, places), None)) is None:
            raise DemoError(f"{folder} has no {file} (nor {file}.gz): put Fashion-MNIST's four files there.")
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as opened:
                content = opened.read()
        except (OSError, EOFError, zlib.error) as error:
            raise DemoError(f"{path} can't be read ({error}): {repair}.") from None
        if hashlib.sha256(content).hexdigest() != expected:
            raise DemoError(f"{path} is truncated or altered (its SHA-256 differs): {repair}.")
        found.append(torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16 if "images" in file else 8))
    train, test = (Split(found[i].view(-1, 1, 28, 28), found[i + 1].long()) for i in (0, 2))
    none = Split(train.images[:0], train.labels[:0])
    digest = hashlib.sha256("".join([*sha256.values(), SPLIT]).encode()).hexdigest()[:16]
    return FashionData(train, none, none, test, name, source, digest)
