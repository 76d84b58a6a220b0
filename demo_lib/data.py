"""Fashion-MNIST as tensors in memory: found on this machine or fetched, checked, split and batched."""

from __future__ import annotations

import gzip
import hashlib
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from demo_lib.config import DemoError, TrainConfig, settings

import torch
from filelock import FileLock
from sklearn.model_selection import train_test_split
from torch import Tensor
from torchvision import datasets

CLASSES = tuple(datasets.FashionMNIST.classes)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = Path(__file__).parent / "sample"
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


class DataError(DemoError):
    """The data is missing, altered or unreadable, or can't be stored."""


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
    """The three splits, what they are a part of (`name`), where they came from (`source`), and `digest`."""

    train: Split
    validation: Split
    test: Split
    name: str
    source: str
    digest: str

    def __str__(self) -> str:
        sizes = f"{len(self.train):,} training, {len(self.validation):,} validation, {len(self.test):,} test images"
        return f"{self.name} from {self.source}: {sizes} (digest {self.digest})"


@dataclass(frozen=True)
class Source:
    """A checked folder for torchvision's dataset class, in words, and the SHA-256 of its files."""

    root: Path
    text: str
    sha256: dict[str, str]

    @property
    def name(self) -> str:
        """What the data is called in MLflow: the sample must not pass for the whole set."""
        return "fashion-mnist" if self.sha256 is FULL_SHA256 else "fashion-mnist-sample"

    @property
    def digest(self) -> str:
        """The first 16 hex digits of the SHA-256 over the digests of the four raw files."""
        return hashlib.sha256("".join(self.sha256.values()).encode()).hexdigest()[:16]


def load_data(config: TrainConfig | None = None) -> FashionData:
    """Find Fashion-MNIST and return its splits, fixed by `config.seed`, stratified by class, never overlapping.

    A twelfth of the training images is the validation split (5,000 of 60,000); the test split is always whole.

    Raises:
        DataError: a file is truncated, altered or unreadable, or the cache can't be written.
    """
    config = config or TrainConfig()
    source = find_data()
    images, labels = _read(source, train=True)
    size = min(config.train_images, len(labels))
    held_out = size // 12
    parts = train_test_split(
        torch.arange(len(labels)),
        train_size=size - held_out,
        test_size=held_out,
        stratify=labels,
        random_state=config.seed,
    )
    train, validation = (Split(images[part], labels[part]) for part in parts)
    return FashionData(train, validation, Split(*_read(source, train=False)), source.name, source.text, source.digest)


def batches(
    split: Split, batch_size: int, generator: torch.Generator | None = None, flip: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images as float32 in [0, 1], shape (B, 1, 28, 28), with their labels.

    Each batch is one index selection from memory on the split's device; a generator on the CPU shuffles, so that the
    order is the same on every device, and with `flip` mirrors each image with probability 1/2.
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

    Every file of the source is checked against its SHA-256.

    Raises:
        DataError: a file is missing from the named folder, truncated, altered or unreadable, or can't be stored.
    """
    options, cache = settings(), settings().home / "data"
    if options.data_dir and _has_all(options.data_dir / RAW):
        return _checked(Source(options.data_dir, f"folder {options.data_dir}", FULL_SHA256))
    if options.data_dir or not _has_all(cache / RAW):
        with _locked(cache):
            if options.data_dir:
                _fill(cache, options.data_dir, FULL_SHA256)
            elif not _has_all(cache / RAW) and not _fill_from_elsewhere(cache, options.download):
                _fill(cache / "sample", SAMPLE, SAMPLE_SHA256)
                return _checked(Source(cache / "sample", SAMPLE_TEXT, SAMPLE_SHA256))
    return _checked(Source(cache, "the cache", FULL_SHA256))


def _fill_from_elsewhere(cache: Path, download: bool) -> bool:
    """Fill the cache from Debian's package or the download; False where neither is to be had."""
    if DEBIAN.is_dir():
        _fill(cache, DEBIAN, FULL_SHA256)
        return True
    if not download:
        return False
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
        try:
            with _socket_timeout(5):
                datasets.FashionMNIST(folder, download=True)
        except (OSError, RuntimeError):
            return False
        _fill(cache, Path(folder), FULL_SHA256)
    return True


def _fill(cache: Path, folder: Path, sha256: dict[str, str]) -> None:
    """Put the folder's files, gunzipped, into the cache; each appears there whole and checked, or not at all."""
    for name, expected in sha256.items():
        candidates = [folder / RAW / name, folder / name, folder / f"{name}.gz", folder / RAW / f"{name}.gz"]
        origin = next(filter(Path.is_file, candidates), None)
        if origin is None:
            raise DataError(f"{folder} has no {name} (nor {name}.gz): put Fashion-MNIST's four files there.")
        target = cache / RAW / name
        if target.is_file() and _sha256(target) == expected:
            continue
        content = _content(origin)
        if hashlib.sha256(content).hexdigest() != expected:
            raise DataError(f"{origin} is not the original file (its SHA-256 differs): replace it by a good copy.")
        _write(target, content)


def _content(origin: Path) -> bytes:
    try:
        with (gzip.open if origin.suffix == ".gz" else open)(origin, "rb") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{origin} can't be read ({error}): replace it by a good copy.") from None


def _write(target: Path, content: bytes) -> None:
    """Write beside the target and rename, so that a crash or a full disk leaves no half file under its name."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".partial-", delete=False) as file:
            partial = Path(file.name)
            try:
                file.write(content)
                file.flush()
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(_cannot_store(target.parent, error)) from None


def _checked(source: Source) -> Source:
    """Return the source, or name the file that is not what it should be."""
    for name, expected in source.sha256.items():
        path = source.root / RAW / name
        try:
            good = _sha256(path) == expected
        except OSError as error:
            raise DataError(f"{path} can't be read ({error.strerror}): make it readable or delete it.") from None
        if not good:
            raise DataError(f"{path} is truncated or altered (its SHA-256 differs): delete it and run again.")
    return source


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(source: Source, train: bool) -> tuple[Tensor, Tensor]:
    dataset = datasets.FashionMNIST(source.root, train=train)
    return dataset.data.unsqueeze(1), dataset.targets


def _has_all(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FULL_SHA256)


def _cannot_store(folder: Path, error: OSError) -> str:
    return f"{folder} can't be written ({error.strerror}): free it, or set DEMO_HOME to a folder that can."


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Let one process at a time fill the cache."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        lock.acquire()
    except OSError as error:
        raise DataError(_cannot_store(cache, error)) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
