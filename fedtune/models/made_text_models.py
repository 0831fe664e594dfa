"""Text models for examples of tasks for which no package ships a pretrained model. Both are made from MiniLM's files.

``t5-untrained`` is a small T5 of random weights. Its tokenizer is MiniLM's, and its end token is ``[SEP]``.
``minilm-mlm`` is MiniLM with a head over the vocabulary for masked tokens. Its embeddings are MiniLM's, and the rest of
the head is random, because the published model lacks the head of its pretraining.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.paths import get_cache_folder
from fedtune.sample_packages import make_folder_once

__all__ = ["make_masked_minilm_folder", "make_untrained_t5_folder"]

Make = Callable[[Path], tuple[Any, Any]]
"""Returns a model and its tokenizer, made from MiniLM's folder."""


def make_untrained_t5_folder(minilm: Path) -> Path:
    """Return the folder of the T5: 2 + 2 layers, 128 wide."""
    return _make_folder("t5-untrained", _make_t5, minilm)


def make_masked_minilm_folder(minilm: Path) -> Path:
    """Return the folder of MiniLM with a head for masked tokens."""
    return _make_folder("minilm-mlm", _make_masked_minilm, minilm)


def _make_folder(name: str, make: Make, minilm: Path) -> Path:
    folder = get_cache_folder() / "text-models" / name
    make_folder_once(folder, lambda beside: _save(make, minilm, beside), f"sample:{name}")
    return folder


def _save(make: Make, minilm: Path, into: Path) -> None:
    """Save the model, whose random weights are drawn from seed 0."""
    import torch  # imported here: a source is resolved by processes that load no model

    from fedtune.models.transformers_logging import silence_transformers

    with silence_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, tokenizer = make(minilm)
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


def _make_t5(minilm: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(minilm, eos_token="[SEP]")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=512,
        num_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.decoder_start_token_id = tokenizer.pad_token_id
    return T5ForConditionalGeneration(config), tokenizer


def _make_masked_minilm(minilm: Path) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, BertForMaskedLM

    return BertForMaskedLM.from_pretrained(minilm), AutoTokenizer.from_pretrained(minilm)
