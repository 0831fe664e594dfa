"""A copy of what transformers' tokenizer came to: its backend, and the settings that encoding depends on."""

import json
from pathlib import Path
from typing import Any

__all__ = ["BACKEND", "COPIED", "SETTINGS", "write_tokenizer"]

BACKEND, SETTINGS = "tokenizer.json", "settings.json"
COPIED = ("pad_token_id", "eos_token_id", "unk_token_id", "all_special_ids", "truncation_side", "split_special_tokens",
           "model_input_names")  # fmt: skip


def write_tokenizer(full: Any, folder: Path) -> None:
    """Write the backend and the settings of a tokenizer that encodes by its backend alone."""
    if not _is_plain(full):
        return
    (folder / BACKEND).write_text(full.backend_tokenizer.to_str(), encoding="utf-8")
    (folder / SETTINGS).write_text(json.dumps({name: getattr(full, name) for name in COPIED}), encoding="utf-8")


def _is_plain(full: Any) -> bool:
    """Whether a tokenizer's class encodes as those of fast tokenizers do, and tells its tokens' types likewise."""
    from transformers import PreTrainedTokenizerFast

    steps = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding", "__len__",
             "num_special_tokens_to_add")  # fmt: skip
    return isinstance(full, PreTrainedTokenizerFast) and all(
        getattr(type(full), step) is getattr(PreTrainedTokenizerFast, step) for step in steps
    )
