"""Makes the train, validation and test splits.

The source's own splits are used. Missing ones are taken from the training split by a stable hash of the group. The
run's seed has no influence.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedtune.data.table import Pictures, Table
from fedtune.files import replace_file_atomically
from fedtune.paths import get_cache_folder
from fedtune.recipe.schema import DataSettings

__all__ = ["iter_contents", "number_groups", "split_dataset"]


def split_dataset(data: DataSettings, found: Mapping[str, Table]) -> dict[str, Table]:
    """Return the three splits. Missing ones are taken from the training split in whole groups."""
    divided, start = dict(found), 0.0
    shares = {"test": data.splits.test, "validation": data.splits.validation}
    lacking = [part for part in shares if part not in found]
    if not lacking:
        return divided
    places = _recall_places(data, found["train"])
    for part in lacking:
        inside = (start <= places) & (places < start + shares[part])
        divided[part] = found["train"].select(np.flatnonzero(inside))
        start += shares[part]
    divided["train"] = found["train"].select(np.flatnonzero(places >= start))
    return divided


def number_groups(table: Table) -> NDArray[np.int64]:
    """Return the group number of each row, from 0. Without groups, each row is its own group."""
    if "group" not in table.column_names:
        return np.arange(len(table))
    return np.unique(np.asarray(table["group"][:]), return_inverse=True)[1].astype(np.int64)


def _recall_places(data: DataSettings, table: Table) -> NDArray[np.float64]:
    """The places of the rows; of columns on the disk they are computed once and kept in the cache."""
    if table.origin is None:
        return _places(table)
    key = hashlib.sha256(f"{table.origin} {data.columns.model_dump_json()}".encode()).hexdigest()
    kept = get_cache_folder() / "places" / f"{key}.npy"
    if not kept.exists():
        with replace_file_atomically(kept) as beside, beside.open("wb") as file:
            np.save(file, _places(table))
    found: NDArray[np.float64] = np.load(kept)
    return found


def _places(table: Table) -> NDArray[np.float64]:
    """Return a number in [0, 1) per row, hashed from its group or its content. Copies of a row get the same number."""
    contents = (group.encode() for group in table["group"]) if "group" in table.column_names else iter_contents(table)
    return np.fromiter((_place(content) for content in contents), np.float64)


def _place(content: bytes) -> float:
    return int.from_bytes(hashlib.sha256(content).digest()[:6], "big") / 2**48


def iter_contents(table: Table) -> Iterator[bytes]:
    """Yield what makes a row a copy of another: its text, conversation, prompt, words or image."""
    if "text" in table.column_names:
        yield from (text.encode() for text in table.column("text").iter_values())
    elif "messages" in table.column_names:
        yield from (
            json.dumps(messages, sort_keys=True).encode() for messages in table.column("messages").iter_values()
        )
    elif "prompt" in table.column_names:
        yield from (prompt.encode() for prompt in table["prompt"])
    elif "words" in table.column_names:
        yield from ("\x1f".join(words).encode() for words in table["words"])
    elif isinstance(table.kinds["image"], Pictures):
        for stored in table.pictures():
            yield stored["bytes"] or Path(stored["path"]).read_bytes()
    else:
        yield from (image.tobytes() for image in table.greys().astype(np.uint8))
