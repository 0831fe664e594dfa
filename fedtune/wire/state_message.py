"""The shared state as a coded message: encoded by the server, decoded on devices before they train.

The server keeps its state in full precision. What a device decodes is where its round starts, and its update is a delta
to that; the server adds the merged deltas to its own state. Rounding is therefore done anew in each round from full
precision, and its errors do not add up. What is no weight, such as statistics of batch norms and what the server sends
of its memory, is not rounded.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.wire.client_update import decode_tensors, pack
from fedtune.wire.codecs import Shape, WirePipeline, decode_values, encode_values
from fedtune.wire.memory_names import is_memory
from fedtune.wire.recipe_codecs import is_running_statistic

__all__ = ["decode_state", "encode_state"]

_CODED = "wire:"
_AMPLIFICATION = 64
_HEADER = 1 << 16


def encode_state(pipeline: WirePipeline, state: Mapping[str, Tensor]) -> bytes:
    """Return the message of a shared state."""
    coded = dict(_encode(pipeline, name, state[name]) for name in state)
    size = len(content := pack(coded)).to_bytes(8, "little")
    return size + pipeline.compress(content)


def _encode(pipeline: WirePipeline, name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if not (pipeline.codecs and _is_weight(name, tensor)):
        return name, tensor
    content = encode_values(pipeline.codecs, tensor, 0)
    return f"{_CODED}{name}", torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _is_weight(name: str, tensor: Tensor) -> bool:
    return (
        tensor.dtype == torch.float32 and tensor.numel() > 0 and not is_memory(name) and not is_running_statistic(name)
    )


def decode_state(pipeline: WirePipeline, message: bytes, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Undo ``encode_state``. ``shapes`` are those of the model's tensors.

    Raise ClientUpdateError for a message that is not of this model, and for one that would expand to more than twice
    the model and 64 times the message.
    """
    size, layout = int.from_bytes(message[:8], "little"), 4 * sum(map(_count_values, shapes.values()))
    if size > 2 * layout + _HEADER + _AMPLIFICATION * len(message):
        raise ClientUpdateError(f"the state would expand to {size} bytes, too many for this model; update the server")
    tensors = decode_tensors(pipeline.decompress(message[8:], size))
    return dict(_decode(pipeline, name, one, shapes) for name, one in tensors.items())


def _decode(pipeline: WirePipeline, name: str, tensor: Tensor, shapes: Mapping[str, Shape]) -> tuple[str, Tensor]:
    if not name.startswith(_CODED):
        return name, tensor
    whole = name.removeprefix(_CODED)
    if whole not in shapes or tensor.dtype != torch.uint8:
        raise ClientUpdateError(f"{whole} is no weight of this model; update the server")
    return whole, decode_values(pipeline.codecs, tensor.numpy().tobytes(), tuple(shapes[whole]), 0)


def _count_values(shape: Shape) -> int:
    return torch.Size(shape).numel()
