"""A BERT body of random weights and its tokenizer of whole words, for benchmarks that need no knowledge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

__all__ = ["save_random_bert"]


def save_random_bert(folder: Path, words: Sequence[str], **shape: Any) -> None:
    """Write the model and its tokenizer to a folder; ``shape`` are settings of transformers' BertConfig."""
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    tokenizer = Tokenizer(WordPiece({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(known), **shape)).save_pretrained(folder)
