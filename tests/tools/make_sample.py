"""Make demo_lib/sample: the first images of each class, in their original order, from the real Fashion-MNIST.

Usage: python tests/tools/make_sample.py ROOT, where ROOT holds torchvision's FashionMNIST/raw. Prints the SHA-256
digests that demo_lib/data.py lists as SAMPLE_SHA256.
"""

import gzip
import hashlib
import sys

from demo_lib.data import SAMPLE

import numpy as np
from torchvision.datasets import FashionMNIST

PER_CLASS = {True: 780, False: 200}
PREFIX = {True: "train", False: "t10k"}


def idx(array: np.ndarray) -> bytes:
    """Encode a uint8 array in the IDX format of the MNIST files."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def main(root: str) -> None:
    for train in (True, False):
        dataset = FashionMNIST(root, train=train)
        labels = dataset.targets.numpy()
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[: PER_CLASS[train]] for c in range(10)]))
        for kind, array in (("images-idx3", dataset.data.numpy()[chosen]), ("labels-idx1", labels[chosen])):
            name, content = f"{PREFIX[train]}-{kind}-ubyte", idx(array)
            (SAMPLE / f"{name}.gz").write_bytes(gzip.compress(content, 9, mtime=0))
            print(f'    "{name}": "{hashlib.sha256(content).hexdigest()}",')


if __name__ == "__main__":
    main(sys.argv[1])
