"""Gram matrices of the inputs of layers with low-rank pairs: sums of x x^T, which add up over clients.

Layers that read the same input share a matrix. A symmetric matrix travels as its upper triangle.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors
from fedtune.continual._fisher_sums import evaluation_mode
from fedtune.errors import ModelError
from fedtune.merging.combine.regmean import accumulate_gram
from fedtune.techniques import Technique, begin_step
from fedtune.techniques.low_rank._low_rank import list_lora_layers

__all__ = ["group_layers_by_input", "measure_grams", "pack_triangle", "unpack_triangle"]

_SHARED = {"key": "value", "k_proj": "v_proj", "k_lin": "v_lin", "k": "v", "gate_proj": "up_proj"}
"""Pairs of layers that read one input, by the last part of their names."""


def group_layers_by_input(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names of the layers that read one input, by the first of them; ModelError for convolutions."""
    layers = dict(list_lora_layers(model))
    for name, layer in layers.items():
        if next(iter(layer.lora_A.values())).weight.dim() != 2:
            raise ModelError(
                f"dual-gpm measures the inputs of linear layers, but {name} is a convolution; leave it out"
            )
    groups: dict[str, tuple[str, ...]] = {}
    for name in layers:
        owner, _, last = name.rpartition(".")
        firsts = (f"{owner}.{first}".lstrip(".") for first, second in _SHARED.items() if second == last)
        first = next((one for one in firsts if one in layers), name)
        groups[first] = (*groups.get(first, ()), name)
    return groups


def measure_grams(
    model: nn.Module, techniques: Sequence[Technique], names: Iterable[str], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return sum x x^T [in, in] over the inputs of the named layers, fp64 on the CPU, without padding."""
    sums: dict[str, Tensor] = {}
    device = find_device(model)
    with evaluation_mode(model), torch.no_grad(), _watch_inputs(model, list(names), sums) as begin:
        for batch in batches:
            inputs = move_tensors({name: one for name, one in batch.items() if name != "labels"}, device)
            begin_step(techniques, model, inputs, 1.0)
            begin(inputs.get("attention_mask"))
            model(**inputs)
    return sums


@contextmanager
def _watch_inputs(model: nn.Module, names: Sequence[str], sums: dict[str, Tensor]) -> Iterator[Any]:
    """Add the Grams of layer inputs to ``sums`` inside the block. Call the yielded function with each batch's mask."""
    mask: list[Tensor | None] = [None]

    def add(name: str, entered: Tensor) -> None:
        rows = entered.reshape(-1, entered.shape[-1])
        if mask[0] is not None and entered.shape[:-1] == mask[0].shape:
            rows = rows[mask[0].reshape(-1).bool()]
        wide = rows.cpu().double()
        accumulate_gram(sums.setdefault(name, torch.zeros(wide.shape[1], wide.shape[1], dtype=torch.float64)), wide)

    with ExitStack() as stack:
        for name in names:

            def pass_input(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                add(name, given[0])

            stack.callback(model.get_submodule(name).register_forward_pre_hook(pass_input).remove)
        yield lambda found: mask.__setitem__(0, found)


def pack_triangle(gram: Tensor) -> Tensor:
    """Return the upper triangle of [n, n] as [n (n + 1) / 2], fp32."""
    rows, columns = torch.triu_indices(len(gram), len(gram))
    return gram[rows, columns].float()


def unpack_triangle(packed: Tensor, width: int) -> Tensor:
    """Undo ``pack_triangle``, fp64."""
    gram = torch.zeros(width, width, dtype=torch.float64)
    rows, columns = torch.triu_indices(width, width)
    gram[rows, columns] = gram[columns, rows] = packed.double()
    return gram
