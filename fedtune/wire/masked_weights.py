"""Masked weights: dense in memory and on disk, but only active values are sent.

The tensor ``layer.mask`` (uint8, 1 where active) marks the active entries of ``layer.weight``. All others are zero.
"""

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError

__all__ = [
    "decode_masked_state",
    "encode_masked_state",
    "find_masks",
    "mask_name",
    "restore_dense_tensors",
    "select_active_values",
]

_MASK, _WEIGHT = "mask", "weight"
Tensors = Mapping[str, Tensor]


def find_masks(state: Tensors) -> dict[str, Tensor]:
    """Return the mask of each masked weight, by the name of the weight."""
    named = {_sibling_name(name, _WEIGHT): name for name in state if name.rpartition(".")[2] == _MASK}
    return {weight: state[mask] for weight, mask in named.items() if weight in state}


def mask_name(weight: str) -> str:
    """Return the name of a weight's mask."""
    return _sibling_name(weight, _MASK)


def _sibling_name(name: str, last: str) -> str:
    owner, dot, _ = name.rpartition(".")
    return f"{owner}{dot}{last}"


def select_active_values(tensors: Tensors, masks: Tensors) -> dict[str, Tensor]:
    """Replace each masked tensor by its active values [active] in memory order. Others stay as they are."""
    return {name: tensor[masks[name].bool()] if name in masks else tensor for name, tensor in tensors.items()}


def restore_dense_tensors(tensors: Tensors, found: Tensors) -> dict[str, Tensor]:
    """Undo ``select_active_values``: restore dense tensors, with zeros where nothing is active."""
    return {name: _scatter_values(tensor, found[name]) if name in found else tensor for name, tensor in tensors.items()}


def _scatter_values(values: Tensor, mask: Tensor) -> Tensor:
    dense = torch.zeros(mask.shape, dtype=values.dtype)
    dense[mask.bool()] = values
    return dense


def encode_masked_state(state: Tensors) -> Tensors:
    """Reduce masked weights to their active values, and masks to one bit per weight, compressed if that is shorter."""
    found = find_masks(state)
    if not found:
        return state
    bits = {mask_name(name): _pack_mask(mask) for name, mask in found.items()}
    return {**select_active_values(state, found), **bits}


def decode_masked_state(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Undo ``encode_masked_state``. ``shapes`` must contain the shapes of its masked weights.

    Raises ClientUpdateError when a mask does not fit its weight or has no weight.
    """
    packed = find_masks(tensors)
    if unknown := sorted(packed.keys() - shapes.keys()):
        raise ClientUpdateError(
            f"there is a mask of {unknown[0]}, which is no weight of this model; send its own state"
        )
    found = {name: _unpack_mask(bits, name, shapes[name]) for name, bits in packed.items()}
    if not found:
        return tensors
    for name, mask in found.items():
        if int(mask.sum()) != tensors[name].numel():
            raise ClientUpdateError(f"{name} has {tensors[name].numel()} values, its mask {int(mask.sum())}; resend it")
    return {**restore_dense_tensors(tensors, found), **{mask_name(name): mask for name, mask in found.items()}}


def _pack_mask(mask: Tensor) -> Tensor:
    plain = np.packbits(mask.numpy().reshape(-1)).tobytes()
    deflated = zlib.compress(plain, 9)
    return torch.frombuffer(bytearray(min(plain, deflated, key=len)), dtype=torch.uint8)


def _unpack_mask(bits: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    count = int(np.prod(shape))
    plain = bits.numpy().tobytes()
    try:
        whole = plain if len(plain) == -(-count // 8) else zlib.decompressobj().decompress(plain, -(-count // 8))
        mask = np.unpackbits(np.frombuffer(whole, np.uint8), count=count)
    except (ValueError, zlib.error) as error:
        raise ClientUpdateError(f"the mask of {name} is damaged ({error}); send it again") from error
    if len(whole) != -(-count // 8):
        raise ClientUpdateError(f"the mask of {name} covers {8 * len(whole)} weights of {count}; send it again")
    return torch.from_numpy(mask.reshape(shape))
