"""Client updates as coded messages: encoded on devices, checked and decoded tensor by tensor on the server.

A message is safetensors, and then the frame of the entropy coder. All coded deltas lie in one tensor of bytes behind a
mark of eight bytes, in the order of their names and without a header, since both ends know all sizes. What codecs leave
alone lies beside it as it is: running statistics of batch norms, and extra tensors such as masks, sums and counts.

With error feedback (EF21, Richtárik et al., arXiv 2106.05203, Algorithm 2) both ends hold an estimate g of the client's
update u. The client sends C(u - g), and both ends take g + C(u - g) as the next estimate, which is what is merged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.wire.client_update import decode_tensors, pack, packed_size
from fedtune.wire.codecs import Shape, WirePipeline, count_coded_bytes, decode_values, encode_values
from fedtune.wire.recipe_codecs import MessagePlace, is_running_statistic

__all__ = ["Estimates", "ReceivedUpdate", "UpdateLayout", "encode_update", "receive_message"]

Tensors = Mapping[str, Tensor]
Estimates = Mapping[str, Tensor]
_PACKED = "wire:up"
_MARK_BYTES = 8


@dataclass(frozen=True)
class UpdateLayout:
    """What both ends know of a message before it is sent.

    ``shapes`` are those of the deltas. ``extras`` are extra tensors, which may be without data (``meta``).
    """

    pipeline: WirePipeline
    shapes: Mapping[str, Shape]
    extras: Tensors

    @cached_property
    def coded(self) -> list[str]:
        """The names of the deltas that codecs change, sorted."""
        return sorted(name for name in self.shapes if self.pipeline.codecs and not is_running_statistic(name))

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """The tensors that are sent as they are; deltas are without data."""
        rest = sorted(self.shapes.keys() - set(self.coded))
        return {**{name: torch.empty(self.shapes[name], device="meta") for name in rest}, **self.extras}

    @cached_property
    def num_packed(self) -> int:
        """The bytes of all coded deltas with their mark."""
        return _MARK_BYTES + sum(map(self.count_bytes, self.coded))

    @cached_property
    def message_size(self) -> int:
        """The bytes of the message before the entropy coder."""
        packed = {_PACKED: torch.empty(self.num_packed, dtype=torch.uint8, device="meta")} if self.coded else {}
        return packed_size({**packed, **self.exact})

    @property
    def most_bytes(self) -> int:
        """The most bytes of the message on the wire."""
        return self.pipeline.get_most_bytes(self.message_size)

    def count_bytes(self, name: str) -> int:
        """Return the bytes of a coded delta."""
        return count_coded_bytes(self.pipeline.codecs, tuple(self.shapes[name]))


def encode_update(
    pipeline: WirePipeline,
    deltas: Tensors,
    extras: Tensors,
    place: MessagePlace,
    estimates: Estimates | None = None,
) -> tuple[bytes, dict[str, Tensor]]:
    """Return the message of a client update, and the next estimates, which are empty without ``estimates``."""
    layout = UpdateLayout(pipeline, {name: tuple(one.shape) for name, one in deltas.items()}, extras)
    tensors, following = {name: deltas.get(name, extras.get(name)) for name in layout.exact}, dict[str, Tensor]()
    contents = [place.make_mark(pipeline, layout.shapes)]
    for name in layout.coded:
        seed, earlier = place.derive_seed(name), (estimates or {}).get(name)
        contents.append(encode_values(pipeline.codecs, _subtract(deltas[name], earlier), seed))
        if estimates is not None:
            received = decode_values(pipeline.codecs, contents[-1], layout.shapes[name], seed)
            following[name] = _add(received, earlier)
    if layout.coded:
        tensors[_PACKED] = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
    return pipeline.compress(pack(tensors)), following  # type: ignore[arg-type]


class ReceivedUpdate(NamedTuple):
    """A message of the right size, with the right names and mark.

    ``tensors`` are those that were sent as they are, ``contents`` the bytes of coded deltas by name, and ``earlier``
    the estimates that the client went on from.
    """

    layout: UpdateLayout
    place: MessagePlace
    tensors: Tensors
    contents: Mapping[str, bytes]
    earlier: Estimates

    def list_forms(self) -> dict[str, Tensor]:
        """Return all tensors of the update by name, coded deltas without data (``meta``)."""
        return {
            **{name: torch.empty(self.layout.shapes[name], device="meta") for name in self.contents},
            **self.tensors,
        }

    def decode_delta(self, name: str) -> Tensor:
        """Return a coded delta; with error feedback, the client's estimated update.

        Raise ClientUpdateError for content that ``encode_update`` never writes.
        """
        seed, shape = self.place.derive_seed(name), tuple(self.layout.shapes[name])
        try:
            received = decode_values(self.layout.pipeline.codecs, self.contents[name], shape, seed)
        except ClientUpdateError as error:
            raise ClientUpdateError(f"{name}: {error}; update the client") from error
        return _add(received, self.earlier.get(name))


def receive_message(layout: UpdateLayout, message: bytes, place: MessagePlace, estimates: Estimates) -> ReceivedUpdate:
    """Return a message that can be decoded. ``estimates`` are those of the feedback round of ``place``.

    A client that lost its own begins anew, and says so by its mark. Raise ClientUpdateError for a message of another
    size, place, recipe or model.
    """
    tensors = decode_tensors(layout.pipeline.decompress(message, layout.message_size))
    content = _take_packed(tensors, layout)
    missing, unknown = sorted(layout.exact.keys() - tensors.keys()), sorted(tensors.keys() - layout.exact.keys())
    if missing or unknown:
        raise ClientUpdateError(f"tensor names differ: missing {missing[:3]}, unknown {unknown[:3]}")
    if not layout.coded:
        return ReceivedUpdate(layout, place, tensors, {}, {})
    anew = place._replace(feedback_round=0)
    found = next(
        (one for one in (place, anew) if content[:_MARK_BYTES] == one.make_mark(layout.pipeline, layout.shapes)), None
    )
    if found is None:
        raise ClientUpdateError("the message is of another round, client, recipe or model; update the client")
    return ReceivedUpdate(layout, found, tensors, _split(layout, content), estimates if found.feedback_round else {})


def _take_packed(tensors: dict[str, Tensor], layout: UpdateLayout) -> bytes:
    """Remove the coded deltas from the tensors and return them."""
    if not layout.coded:
        return b""
    packed = tensors.pop(_PACKED, None)
    if packed is None or packed.dtype != torch.uint8 or tuple(packed.shape) != (layout.num_packed,):
        raise ClientUpdateError(f"it lacks {_PACKED} of {layout.num_packed} bytes; update the client")
    return packed.numpy().tobytes()


def _split(layout: UpdateLayout, content: bytes) -> dict[str, bytes]:
    """Return the bytes of each coded delta."""
    contents, start = dict[str, bytes](), _MARK_BYTES
    for name in layout.coded:
        stop = start + layout.count_bytes(name)
        contents[name] = content[start:stop]
        start = stop
    return contents


def _subtract(delta: Tensor, earlier: Tensor | None) -> Tensor:
    return delta if earlier is None else delta - earlier


def _add(received: Tensor, earlier: Tensor | None) -> Tensor:
    return received if earlier is None else earlier + received
