"""Small grey images that packages ship: MNIST-5k, scikit-learn's digits and Fashion-MNIST."""

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtune.data.column import Values
from fedtune.data.table import Classes, Greys, Kind, Table
from fedtune.errors import ChecksumError, SourceError
from fedtune.sample_packages import SAMPLE_PACKAGES, fetch_sample

__all__ = ["digits", "fashion_mnist", "mnist_5k"]

FASHION_MNIST_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
"""Class names in order, as listed by Xiao et al. 2017 (arXiv 1708.07747)."""
FASHION_SHA256 = {
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
}
"""Digests of the unpacked files. Distributions compress them again, which changes the gzip header."""


def mnist_5k() -> dict[str, Table]:
    """Return the 5000 images of MNIST-5k, 28 x 28, 500 per class."""
    table = _csv(fetch_sample("mnist-5k") / SAMPLE_PACKAGES["mnist-5k"].members[0])
    return {"train": _table(table[:, :-1].reshape(-1, 28, 28), table[:, -1])}


def digits() -> dict[str, Table]:
    """Return 1797 images of digits, 8 x 8. The 17 grey levels are scaled to 0..255."""
    table = _csv(fetch_sample("digits") / "digits.csv.gz")
    return {"train": _table((table[:, :-1] * 255 / 16).round().reshape(-1, 8, 8), table[:, -1])}


def fashion_mnist() -> dict[str, Table]:
    """Return 70,000 images of clothes, 28 x 28, in the published training and test splits.

    Raises SourceError when a file is missing or damaged, ChecksumError when its content is not the published one.
    """
    folder = fetch_sample("fashion-mnist")
    return {part: _clothes(folder, prefix) for part, prefix in {"train": "train", "test": "t10k"}.items()}


def _csv(path: Path) -> NDArray[np.float64]:
    """Read a gzipped table [rows, columns] of numbers without a header."""
    text = gzip.decompress(path.read_bytes()).decode("ascii")
    width = text.partition("\n")[0].count(",") + 1
    return np.fromstring(text.replace("\n", ","), np.float64, sep=",").reshape(-1, width)


def _clothes(folder: Path, prefix: str) -> Table:
    """Read the IDX format: a header of 16 bytes for images or 8 bytes for labels, then unsigned bytes."""
    images = np.frombuffer(_published(folder, f"{prefix}-images-idx3-ubyte"), np.uint8, offset=16)
    labels = np.frombuffer(_published(folder, f"{prefix}-labels-idx1-ubyte"), np.uint8, offset=8)
    return _table(images.reshape(-1, 28, 28), labels, Classes(FASHION_MNIST_LABELS))


def _published(folder: Path, name: str) -> bytes:
    path = folder / f"{name}.gz"
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise SourceError(f"{path} is missing or damaged; install dataset-fashion-mnist again") from error
    if (found := hashlib.sha256(content).hexdigest()) != FASHION_SHA256[name]:
        wanted = FASHION_SHA256[name]
        raise ChecksumError(f"{path} holds sha256 {found}, but {wanted} was published; do not trust it")
    return content


def _table(images: NDArray[np.generic], labels: NDArray[np.generic], names: Classes | None = None) -> Table:
    columns = {"image": Values(images.astype(np.uint8)), "label": Values(labels.astype(np.int64))}
    kinds: dict[str, Kind] = {"image": Greys()}
    return Table(columns, kinds if names is None else {**kinds, "label": names})
