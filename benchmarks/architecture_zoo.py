"""Small random models of many architectures, made from transformers' own configurations, in folders of their own."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from benchmarks.architecture_settings import ARCHITECTURES, PIXELS, SPECIAL, WORDS
from fedtune.tasks import Task

__all__ = ["LABELS", "text", "tokenizer", "write"]

LABELS = ("bad", "good", "so-so")


def text(row: int) -> str:
    """Three to eight words."""
    return " ".join(WORDS[(row * 7 + place * 3) % len(WORDS)] for place in range(3 + row % 6))


def write(name: str, folder: Path) -> Task:
    """Save an architecture's model, drawn from a seed, with head and tokenizer; returns its task."""
    kind, task, settings = ARCHITECTURES[name]
    labels = (
        {
            "num_labels": len(LABELS),
            "id2label": dict(enumerate(LABELS)),
            "label2id": {label: number for number, label in enumerate(LABELS)},
        }
        if task.has_classes
        else {}
    )
    named = {"architectures": [f"{kind}{task.auto_class.removeprefix('AutoModel')}"]}
    config = getattr(transformers, _config_name(kind))(**settings, **labels, **named)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, task.auto_class).from_config(config)
        _warm(model)
    model.save_pretrained(folder)
    if task.reads_text:
        tokenizer(kind).save_pretrained(folder)
    return task


@torch.no_grad()
def _warm(model: Any) -> None:
    """Let batch norms see a few pictures, as trained ones have: without, what passes them all but vanishes."""
    norms = [layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for layer in norms:
        layer.momentum = 1.0
    if norms:
        model.train()(torch.randn(8, 3, PIXELS, PIXELS))
        model.eval()


def _config_name(kind: str) -> str:
    return "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words as they are; Qwen2's own class reads only pieces of bytes."""
    if kind.startswith("Qwen2"):
        letters = sorted({letter for word in WORDS for letter in word} | {"\u0120"})
        made = Tokenizer(BPE({piece: number for number, piece in enumerate([*SPECIAL, *letters])}, []))
    else:
        made = Tokenizer(WordLevel({word: number for number, word in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
        made.pre_tokenizer = Whitespace()
    pad, unknown, begin, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=pad,
        unk_token=unknown,
        bos_token=begin,
        eos_token=end,
        cls_token=begin,
        sep_token=end,
    )
