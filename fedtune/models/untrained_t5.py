"""A small T5 of random weights. No package ships a pretrained encoder-decoder, so examples start from nothing.

Its tokenizer is MiniLM's, so its words are whole pieces of English; the end token is ``[SEP]``.
"""

from pathlib import Path

from fedtune.paths import get_cache_folder
from fedtune.sample_packages import make_folder_once

__all__ = ["make_untrained_t5_folder"]


def make_untrained_t5_folder(tokenizer_folder: Path) -> Path:
    """Return the folder of the model: 2 + 2 layers, 128 wide, weights drawn from seed 0."""
    folder = get_cache_folder() / "text-models" / "t5-untrained"
    make_folder_once(folder, lambda beside: _save_model(tokenizer_folder, beside), "sample:t5-untrained")
    return folder


def _save_model(tokenizer_folder: Path, into: Path) -> None:
    import torch  # imported here: a source is resolved by processes that load no model
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, eos_token="[SEP]")
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(into)
    tokenizer.save_pretrained(into)
