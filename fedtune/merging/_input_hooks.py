"""Hooks that pass the inputs of layers on as rows of channels, without padding."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

__all__ = ["Batch", "hook_layer_inputs"]

Batch = Mapping[str, Tensor]
Note = Callable[[str, Tensor], None]


@contextmanager
def hook_layer_inputs(layers: Mapping[str, tuple[nn.Module, int]], on_input: Note) -> Iterator[Callable[[Batch], None]]:
    """Inside the block, call ``on_input`` with a layer's name and rows [n, channels] whenever the layer runs.

    ``layers`` gives the channel axis of each layer's input. Call the returned function with each batch before it runs.
    If an input has the shape of the attention mask [batch, tokens], only its real tokens become rows. Of other inputs,
    such as pooled ones or tokens routed to an expert, all rows are passed on.
    """
    real: list[Tensor | None] = [None]

    def begin(batch: Batch) -> None:
        mask = batch.get("attention_mask")
        real[0] = mask.bool() if mask is not None and mask.dim() == 2 else None

    def pass_input(name: str, axis: int, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        entered: Tensor = given[0] if given else next(iter(named.values()))
        on_input(name, _rows(entered.movedim(axis, -1), real[0]))

    with ExitStack() as stack:
        for name, (layer, axis) in layers.items():
            hook = partial(pass_input, name, axis)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield begin


def _rows(entered: Tensor, real: Tensor | None) -> Tensor:
    """Return the rows [rows, channels] of an input [..., channels], without padding."""
    rows = entered.reshape(-1, entered.shape[-1])
    per_token = real is not None and entered.shape[:-1] in (real.shape, (real.numel(),))
    return rows[real.reshape(-1)] if real is not None and per_token else rows
