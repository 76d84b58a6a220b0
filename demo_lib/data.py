"""Fashion-MNIST as tensors in memory: found on this machine or fetched, checked, split and batched."""

from __future__ import annotations

import gzip
import hashlib
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from demo_lib.config import DemoError, TrainConfig, settings, whole_file

import torch
from torch import Tensor

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"  # Zalando's own
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = Path(__file__).parent / "sample"
# Another way to split is other data: the gate must know who has seen which images.
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
SAMPLE_TEXT = "the shipped sample of 9,800 images, NOT the whole set"


@dataclass(frozen=True)
class Split:
    """Images as uint8 of shape (N, 1, 28, 28), pixel values 0 to 255, and labels as int64 of shape (N,), 0 to 9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Split:
        """Return the split on the device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class FashionData:
    """The four splits, what they are a part of (`name`), where they were read (`source`), and `digest`."""

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


@dataclass(frozen=True)
class Source:
    """The content of the four raw files by name, checked against `sha256`, and its place: `text` in words, `folder`."""

    text: str
    folder: Path
    sha256: dict[str, str]
    files: dict[str, bytes]

    @property
    def name(self) -> str:
        """What the data is called in MLflow: the sample must not pass for the whole set."""
        return "fashion-mnist" if self.sha256 is FULL_SHA256 else "fashion-mnist-sample"

    @property
    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 over the digests of the four raw files and the way they are split."""
        return hashlib.sha256("".join([*self.sha256.values(), SPLIT]).encode()).hexdigest()[:16]

    def split(self, part: Literal["train", "t10k"]) -> Split:
        """Return all images of the part: an IDX file is a short header, of 16 or 8 bytes, and the tensor's bytes."""
        images, labels = (bytearray(self.files[f"{part}-{kind}-ubyte"]) for kind in ("images-idx3", "labels-idx1"))
        pixels = torch.frombuffer(images, dtype=torch.uint8, offset=16)
        return Split(pixels.view(-1, 1, 28, 28), torch.frombuffer(labels, dtype=torch.uint8, offset=8).long())


def load_data(config: TrainConfig | None = None) -> FashionData:
    """Find Fashion-MNIST and return its splits, fixed by `config.seed` and `train_images`, stratified by class.

    A twelfth of the training images, the same for every configuration, is the gate split: no network is trained or
    chosen on it. Of the others as many as the configuration asks for, a twelfth of these for validation. The test split
    is always whole. With one seed, no size has in its training split what another has in its validation split.
    Errors are those of `find_data`.
    """
    config = config or TrainConfig()
    source = find_data()
    known = source.split("train")
    members = known.labels.argsort(stable=True).view(len(CLASSES), -1)  # one row a class: all have as many images
    kept = members.shape[1] // 12
    others, gate = members[:, :-kept], members[:, -kept:]
    drawn = torch.rand(others.shape, generator=torch.Generator().manual_seed(config.seed)).argsort(dim=1, stable=True)
    order = others.gather(1, drawn).T.flatten()  # the classes in turn: any stretch has each as often, give or take one
    size = min(config.train_images, len(order))
    held_out = size // 12
    parts = order[: size - held_out], order[-held_out:], gate.T.flatten()
    train, validation, gated = (Split(known.images[part], known.labels[part]) for part in parts)
    return FashionData(
        train, validation, gated, source.split("t10k"), name=source.name, source=source.text, digest=source.digest
    )


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


def find_data() -> Source:
    """Return the first of: DEMO_DATA_DIR, the cache, Debian's package, torchvision's download, the shipped sample.

    Every file is checked against its SHA-256. The cache keeps what comes from the package or the download.
    A file that is missing from the named folder, damaged, unreadable or that can't be stored is a DemoError.
    """
    options, cache = settings(), settings().home / "data"
    if options.data_dir:
        return Source(f"folder {options.data_dir}", options.data_dir, FULL_SHA256, _read(options.data_dir, FULL_SHA256))
    if not all(_is_file(cache / RAW / name) for name in FULL_SHA256):
        try:
            files = _read(DEBIAN, FULL_SHA256) if DEBIAN.is_dir() else _download(cache) if options.download else {}
            for name, content in files.items():
                (cache / RAW).mkdir(parents=True, exist_ok=True)
                with whole_file(cache / RAW / name) as partial:
                    partial.write_bytes(content)
        except OSError as error:
            why = f"{cache} can't be written ({error.strerror}): free it, or set DEMO_HOME to a folder that can."
            raise DemoError(why) from None
        if not files:
            return Source(SAMPLE_TEXT, SAMPLE, SAMPLE_SHA256, _read(SAMPLE, SAMPLE_SHA256))
    files = _read(cache, FULL_SHA256, repair="delete it and run again")
    return Source("the cache", cache, FULL_SHA256, files)


def _download(cache: Path) -> dict[str, bytes]:
    """Let torchvision download the files and return them as `_read` does; none where that fails."""
    cache.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        socket.setdefaulttimeout(5)
        try:
            from torchvision.datasets import FashionMNIST  # here only: it takes seconds to load

            FashionMNIST(folder, download=True)
        except (OSError, RuntimeError):
            return {}
        finally:
            socket.setdefaulttimeout(before)
        return _read(Path(folder), FULL_SHA256)


def _read(folder: Path, sha256: dict[str, str], repair: str = "replace it by a good copy") -> dict[str, bytes]:
    """Return the content of the files by name, gunzipped and checked; a bad one is an error that says how to repair."""
    files = {}
    for name, expected in sha256.items():
        places = [folder / RAW / name, folder / name, folder / f"{name}.gz", folder / RAW / f"{name}.gz"]
        if (path := next(filter(_is_file, places), None)) is None:
            raise DemoError(f"{folder} has no {name} (nor {name}.gz): put Fashion-MNIST's four files there.")
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                files[name] = file.read()
        except (OSError, EOFError, zlib.error) as error:
            raise DemoError(f"{path} can't be read ({error}): make it readable, or {repair}.") from None
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise DemoError(f"{path} is truncated or altered (its SHA-256 differs): {repair}.")
    return files


def _is_file(path: Path) -> bool:
    with suppress(OSError):  # a folder that this user may not look into
        return path.is_file()
    return False
