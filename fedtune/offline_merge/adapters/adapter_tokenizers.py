"""The tokenizers beside adapters. They must agree if the adapters contain rows of tokens."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from fedtune.errors import ModelError
from fedtune.offline_merge.adapters.lora_adapter import LoraAdapterReader, strip_peft_prefix
from fedtune.offline_merge.token_tensor_names import is_of_tokens
from fedtune.offline_merge.vocabularies import (
    TOKENIZER,
    compare_vocabularies,
    has_same_tokenizer_file,
    has_tokenizer,
    read_vocabulary,
)

__all__ = ["common_tokens", "copy_tokenizer"]


def common_tokens(adapters: Sequence[LoraAdapterReader]) -> Path | None:
    """Return a folder with the tokenizer that all adapters share; None if none has one, or if they differ.

    Raises ModelError if they differ and the adapters contain rows of tokens, because rows are merged by token id.
    """
    folders = [one.folder for one in adapters if has_tokenizer(one.folder)]
    for other in folders[1:]:
        if not has_same_tokenizer_file(folders[0], other) and (found := read_vocabulary(other)) != (
            first := read_vocabulary(folders[0])
        ):
            if not any(_holds_rows(one) for one in adapters):
                return None
            more, less, moved = compare_vocabularies(found or {}, first or {})
            raise ModelError(
                f"{other} has {more} tokens that {folders[0]} lacks, lacks {less} and numbers {moved} differently, and "
                "the adapters hold rows of tokens; merge them as models with a tokenizer rule"
            )
    return folders[0] if folders else None


def copy_tokenizer(source: Path, into: Path) -> None:
    """Copy the tokenizer's files."""
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, into / name)


def _holds_rows(adapter: LoraAdapterReader) -> bool:
    names = [f"{module}.weight" for module in adapter.modules] + [
        strip_peft_prefix(name) for name in adapter.extra_tensors
    ]
    return any(is_of_tokens(name) for name in names)
