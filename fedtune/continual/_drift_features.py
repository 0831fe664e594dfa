"""The features that a drift signal is computed of: the inputs of the last layer, with everything below as pretrained.

Trained features would move from round to round, and a reference with them. So a recipe may train the last layer and
low-rank pairs only. The pairs are switched off while features are read: they are those of the pretrained model, and
the reference stays valid.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors
from fedtune.continual._masked_head import find_head
from fedtune.errors import ModelError, RecipeError
from fedtune.techniques import Technique, begin_step, list_low_rank_pairs, list_trainable_tensors

__all__ = ["check_features_stay", "find_last_layer", "read_features"]


def find_last_layer(model: nn.Module, num_labels: int) -> nn.Module:
    """Return the last layer: of a classifier, or the one that makes the logits of tokens. ModelError without any."""
    if num_labels:
        return find_head(model, num_labels)
    find: Any = getattr(model, "get_output_embeddings", None)
    layer = None if find is None else find()
    if not isinstance(layer, nn.Module):
        raise ModelError(
            f"stream.drift: {type(model).__name__} has no last layer that makes logits, so there are no features to "
            "compare; drop drift"
        )
    return layer


def check_features_stay(techniques: Sequence[Technique], model: nn.Module, num_labels: int) -> None:
    """Raise RecipeError if training changes the pretrained layers below the last one."""
    last = {id(parameter) for parameter in find_last_layer(model, num_labels).parameters()}
    trained = {name for name in list_trainable_tensors(model) if id(_find_tensor(model, name)) not in last}
    pairs = list_low_rank_pairs(techniques, model)
    moving = trained - {name for pair in pairs for name in (pair.left, pair.right)}
    moving |= {pair.base for pair in pairs if pair.base is not None}
    if moving:
        raise RecipeError(
            f"stream.drift: {'+'.join(one.name for one in techniques)} trains {min(moving)}, so the features would "
            "move and the reference with them; train head-only or lora, or drop drift"
        )


def read_features(
    model: nn.Module, techniques: Sequence[Technique], num_labels: int, batches: Iterable[Mapping[str, Tensor]]
) -> Tensor:
    """Return the features [examples, width] of examples, on the CPU. Those of tokens are averaged per example."""
    device, found = find_device(model), []
    model.eval()
    with torch.no_grad(), _switch_off_pairs(techniques, model), _capture(find_last_layer(model, num_labels)) as inputs:
        for batch in batches:
            given = move_tensors({name: one for name, one in batch.items() if name != "labels"}, device)
            begin_step(techniques, model, given, 1.0)
            model(**given)
            found.append(_average_tokens(inputs.pop(), given.get("attention_mask")).float().cpu())
            inputs.clear()
    return torch.cat(found)


def _find_tensor(model: nn.Module, name: str) -> Tensor:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return tensors[name]


@contextmanager
def _capture(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of a layer inside the block."""
    found: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        found.append(given[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _switch_off_pairs(techniques: Sequence[Technique], model: nn.Module) -> Iterator[None]:
    """Let the product of each low-rank pair be zero inside the block."""
    left = [_find_tensor(model, pair.left) for pair in list_low_rank_pairs(techniques, model)]
    values = [factor.detach().clone() for factor in left]
    for factor in left:
        factor.data.zero_()
    try:
        yield
    finally:
        for factor, value in zip(left, values, strict=True):
            factor.data.copy_(value)


def _average_tokens(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the real tokens of [examples, tokens, width]; [examples, width] as it is."""
    if inputs.dim() < 3:
        return inputs
    rows = inputs.flatten(1, -2)
    weight = torch.ones(rows.shape[:2], device=rows.device) if mask is None else mask.to(rows.dtype)
    return (rows * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp(min=1)
