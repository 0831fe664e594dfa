"""Checks that the model can process the encoded examples, so that training does not fail later or learn nothing."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.accelerator import find_device, move_tensors
from fedtune.data import EncodedDataset
from fedtune.data.token_files import StoredTexts
from fedtune.errors import DataError, ModelError
from fedtune.recipe.schema import Recipe

__all__ = ["require_readable"]

_MOST_UNKNOWN = 0.5
_TOGETHER = 1024
_NEAR = 8
"""Some models accept a few tokens fewer than their configuration declares."""
_BROKEN = (IndexError, RuntimeError, ValueError)


def require_readable(model: nn.Module, examples: EncodedDataset, recipe: Recipe, tokenizer: Any = None) -> None:
    """Raise ModelError or DataError for tokens, texts or images that do not fit the model.

    The examples must be encoded for the model's task.
    """
    if not len(examples):
        return
    if examples.lengths is None:
        _require_size(model, examples, recipe)
        return
    ids = examples.make_batch([int(examples.lengths.argmax())])["input_ids"]
    counts, largest = _count_tokens(examples)
    _require_rows(model, largest, recipe)
    _require_words(counts, tokenizer, recipe)
    _require_positions(model, ids, recipe)


def _require_rows(model: nn.Module, largest: int, recipe: Recipe) -> None:
    able: Any = model
    rows: int = able.get_input_embeddings().num_embeddings
    if largest >= rows:
        raise ModelError(
            f"{recipe.model.source}: its tokenizer has a token number {largest}, but its embedding only {rows} rows; "
            "take the tokenizer the model was made with, or resize the embedding"
        )


def _require_words(counts: Tensor, tokenizer: Any, recipe: Recipe) -> None:
    """Raise DataError when most tokens are unknown or there are none: the tokenizer fits neither the text nor the
    model.
    """
    if tokenizer is None:
        return
    known = torch.arange(len(counts))
    special = torch.tensor(sorted(tokenizer.all_special_ids))
    unknown = -1 if tokenizer.unk_token_id in (None, tokenizer.eos_token_id) else int(tokenizer.unk_token_id)
    strange = int(counts[known == unknown].sum())
    words = int(counts[~torch.isin(known, special)].sum())
    if strange > _MOST_UNKNOWN * (words + strange) or not words:
        flaw = f"knows {words} of the {words + strange} words and signs" if strange else "makes no tokens"
        raise DataError(
            f"{recipe.model.source}: its tokenizer {flaw} of the examples, which nothing could be learned from; take "
            "a model for their language, with its tokenizer's files"
        )


def _count_tokens(examples: EncodedDataset) -> tuple[Tensor, int]:
    """How often each token occurs, and the largest one of all batches, padding included."""
    if isinstance(examples, StoredTexts):
        return examples.count_tokens(), examples.largest_token
    counts, largest = torch.zeros(0, dtype=torch.int64), 0
    for start in range(0, len(examples), _TOGETHER):
        batch = examples.make_batch(range(start, min(start + _TOGETHER, len(examples))))
        largest = max(largest, int(batch["input_ids"].max()))
        counted = batch["input_ids"][batch["attention_mask"].bool()].bincount(minlength=largest + 1)
        counts = counted + F.pad(counts, (0, len(counted) - len(counts)))
    return counts, largest


def _require_positions(model: nn.Module, ids: Tensor, recipe: Recipe) -> None:
    longest = ids.shape[1]
    declared = _told_positions(model)
    if declared is None or longest <= declared - _NEAR or _reads(model, {"input_ids": ids}) is None:
        return
    able, unable = 0, longest
    while unable - able > 1:
        middle = (able + unable) // 2
        able, unable = (middle, unable) if _reads(model, {"input_ids": ids[:, :middle]}) is None else (able, middle)
    raise ModelError(
        f"{recipe.model.source} reads at most {able} tokens, but a text has {longest} after the cut "
        f"to train.max_length {recipe.train.max_length}; set train.max_length to {able}"
    )


def _told_positions(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if config is None:
        return None
    names = ("max_position_embeddings", "n_positions")
    found = [getattr(config.get_text_config(), name, None) for name in names]
    return min((number for number in found if isinstance(number, int) and number > 0), default=None)


def _require_size(model: nn.Module, examples: EncodedDataset, recipe: Recipe) -> None:
    """Raise ModelError where the model cannot read an image or a recording of the size that all have."""
    batch = examples.make_batch([0])
    if "pixel_values" in batch:
        _require_side(model, batch["pixel_values"], recipe)
        return
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if (why := _reads(model, inputs)) is not None:
        raise ModelError(f"{recipe.model.source} cannot read the recordings ({why}); change max_seconds of the task")


def _require_side(model: nn.Module, pixels: Tensor, recipe: Recipe) -> None:
    size = getattr(getattr(model, "config", None), "image_size", None)
    if size is None or size == pixels.shape[-1]:
        return
    if (why := _reads(model, {"pixel_values": pixels.to(next(model.parameters()).dtype)})) is not None:
        raise ModelError(
            f"{recipe.model.source} cannot read images of {pixels.shape[-1]} pixels ({why}); change train.image_size"
        )


def _reads(model: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """Run the model on one example. Return the error message, or None."""
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(**move_tensors(inputs, find_device(model)))
    except _BROKEN as error:
        return " ".join(str(error).split("\n")[0].split()).rstrip(".")
    finally:
        model.train(training)
    return None
