"""Find a network's inverted residual blocks, and the layers before and after them.

A block widens its channels with a convolution of one pixel (or not), filters each channel by itself, may weigh the
channels by a gate (squeeze-excite), and narrows them without an activation. Sandler et al., "MobileNetV2".
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from fedtune.errors import ModelError
from fedtune.techniques._module_trace import ModuleCall, trace_modules

__all__ = [
    "InvertedResidualLayers",
    "NetworkSplit",
    "TailLayers",
    "find_inverted_residuals",
    "split_before_last_blocks",
]

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.SiLU, nn.GELU)

_LETTERS: dict[type[nn.Module], str] = {nn.BatchNorm2d: "N", nn.Linear: "L", **dict.fromkeys(_ACTIVATIONS, "A")}

_BLOCK = re.compile(r"(?P<widen>PNA)?o*(?P<filter>DNA)(?P<gate>o*[PL]A[PL]A)?o*(?P<narrow>PN)o*")
"""A block's layers in the letters of ``_letter``."""


@dataclass(frozen=True)
class InvertedResidualLayers:
    """Names of a block's layers: its ``inner`` norms stand before activations, the ``last`` one does not."""

    name: str
    convolutions: tuple[str, ...]
    inner_norms: tuple[str, ...]
    activations: tuple[str, ...]
    gate_layers: tuple[str, ...]
    last_norm: str


@dataclass(frozen=True)
class TailLayers:
    """Names of the layers after the last block: up to the pooling, usually one of each; dropouts to the end."""

    convolutions: tuple[str, ...]
    norms: tuple[str, ...]
    activations: tuple[str, ...]
    dropouts: tuple[str, ...]


@dataclass(frozen=True)
class NetworkSplit:
    """The last blocks of a network, the modules that run before them, and the tail after them."""

    frozen_modules: tuple[str, ...]
    blocks: tuple[InvertedResidualLayers, ...]
    tail: TailLayers


def find_inverted_residuals(model: nn.Module) -> list[InvertedResidualLayers]:
    """A network's inverted residual blocks in the order they run; ModelError if there are none."""
    return [block for _, block in _find_blocks(model, _trace_network(model))]


def split_before_last_blocks(model: nn.Module, count: int) -> NetworkSplit:
    """The network, split before its last ``count`` blocks; ModelError if that is impossible."""
    calls = _trace_network(model)
    found = _find_blocks(model, calls)
    if count > len(found):
        raise ModelError(f"{type(model).__name__} has {len(found)} inverted residual blocks, not {count}; take fewer")
    chosen = found[-count:]
    before = tuple(_chain(model, calls, chosen[0][0]))
    return NetworkSplit(before, tuple(block for _, block in chosen), _tail(calls, chosen[-1][0]))


def _trace_network(model: nn.Module) -> list[ModuleCall]:
    """The modules that the model runs. A model without depthwise convolutions is refused before it runs."""
    if not any(_letter(module) == "D" for module in model.modules()):
        raise ModelError(
            f"{_describe_missing_blocks(model)}: no convolution filters each channel by itself; choose full or lora"
        )
    return trace_modules(model)


def _describe_missing_blocks(model: nn.Module) -> str:
    return f"{type(model).__name__} has no inverted residual blocks"


def _find_blocks(model: nn.Module, calls: Sequence[ModuleCall]) -> list[tuple[ModuleCall, InvertedResidualLayers]]:
    """Outermost modules that run just what a block is."""
    found: list[tuple[ModuleCall, InvertedResidualLayers]] = []
    for call in calls:
        inside_one = any(call.is_inside(other) for other, _ in found)
        block = None if inside_one or _is_leaf(call) else _block(call, [one for one in calls if one.is_inside(call)])
        if block is not None:
            found.append((call, block))
    if not found:
        raise ModelError(
            f"{_describe_missing_blocks(model)}: none of its modules widens, filters and narrows; choose full or lora"
        )
    return found


def _block(call: ModuleCall, inside: Sequence[ModuleCall]) -> InvertedResidualLayers | None:
    leaves = [one for one in inside if _is_leaf(one)]
    match = _BLOCK.fullmatch("".join(_letter(leaf.module) for leaf in leaves))
    if match is None:
        return None
    names = [leaf.name for leaf in leaves]
    widen, deep, gate, narrow = (names[slice(*match.span(part))] for part in ("widen", "filter", "gate", "narrow"))
    return InvertedResidualLayers(
        call.name,
        convolutions=(*widen[:1], deep[0], narrow[0]),
        inner_norms=(*widen[1:2], deep[1]),
        activations=(*widen[2:], deep[2]),
        gate_layers=tuple(gate),
        last_norm=narrow[1],
    )


def _letter(layer: nn.Module) -> str:
    """D: filters each channel by itself, P: mixes them pixel by pixel, C: another convolution, N, A, L, or o."""
    if isinstance(layer, nn.Conv2d):
        if 1 < layer.groups == layer.in_channels == layer.out_channels:
            return "D"
        return "P" if layer.groups == 1 and layer.kernel_size == (1, 1) else "C"
    return next((letter for kind, letter in _LETTERS.items() if isinstance(layer, kind)), "o")


def _is_leaf(call: ModuleCall) -> bool:
    return not any(True for _ in call.module.children())


def _chain(model: nn.Module, calls: Sequence[ModuleCall], end: ModuleCall) -> Iterator[str]:
    """Outermost modules that pass the picture on, one to the next, until it is what ``end`` takes."""
    passed, now = calls[0].input, -1
    while passed is not end.input:
        able = (
            call for call in calls if call.started_at > now and call.ended_at < end.started_at and call.input is passed
        )
        call = next(able, None)
        if call is None:
            raise ModelError(
                f"{type(model).__name__} does more than run modules before {end.name}; choose full or lora"
            )
        yield call.name
        passed, now = call.output, call.ended_at


def _tail(calls: Sequence[ModuleCall], last: ModuleCall) -> TailLayers:
    leaves = [call for call in calls if call.started_at > last.ended_at and _is_leaf(call)]
    map_layers = list(takewhile(lambda leaf: _letter(leaf.module) in "CDPNA", leaves))
    convolutions, norms, activations = (
        tuple(leaf.name for leaf in map_layers if _letter(leaf.module) in letters) for letters in ("CDP", "N", "A")
    )
    dropouts = tuple(leaf.name for leaf in leaves if isinstance(leaf.module, nn.Dropout))
    return TailLayers(convolutions, norms, activations, dropouts)
