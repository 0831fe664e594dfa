"""Texts as token files in the cache: tokenised once, then found by what they were made from."""

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtune.data import Table
from fedtune.data.encoded_texts import EncodedTexts
from fedtune.data.mapped_pages import MappedPages
from fedtune.data.token_files import StoredTexts, write_token_files
from fedtune.errors import RecipeError
from fedtune.files import hash_file
from fedtune.paths import get_cache_folder
from fedtune.recipe.schema import Recipe
from fedtune.tasks._task import Task

__all__ = ["encode_on_disk"]

_VERSION = 1
_SLICE = 256
"""Texts that are tokenised together."""


def encode_on_disk(task: Task, examples: Table, recipe: Recipe, reader: Any) -> StoredTexts:
    """The examples as the task encodes them, read from files; RecipeError for a task whose labels are not per token."""
    if not task.can_pack:
        raise RecipeError(f"data.tokens: {task.name} keeps its tokens in memory; set data.tokens to memory")
    folder = get_cache_folder() / "tokens" / _make_key(task, examples, recipe, reader)
    if not folder.exists():
        slices = _iter_slices(task, examples, recipe, reader)
        write_token_files(folder, slices, vocabulary=len(reader), padding=int(reader.pad_token_id))
    return StoredTexts(folder, examples.domains)


def _iter_slices(task: Task, examples: Table, recipe: Recipe, reader: Any) -> Iterator[EncodedTexts]:
    pages = MappedPages()
    for made in task.iter_encoded(examples, recipe, reader, _SLICE):
        assert isinstance(made, EncodedTexts)
        yield made
        pages.drop_read()


def _make_key(task: Task, examples: Table, recipe: Recipe, reader: Any) -> str:
    """The digest of all that decides what the tokens are."""
    rows = "all" if examples.rows is None else hashlib.sha256(examples.rows.tobytes()).hexdigest()
    told = (
        _VERSION,
        examples.origin,
        rows,
        recipe.data.columns.model_dump_json(),
        task.name,
        task.model_dump_json(),
        recipe.train.max_length,
        _digest_reader(task, reader),
        *(["split"] if recipe.train.long_texts == "split" else []),
    )
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _digest_reader(task: Task, reader: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        task.save_reader(reader, Path(folder))
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return " ".join(f"{path.name} {hash_file(path)}" for path in files)
