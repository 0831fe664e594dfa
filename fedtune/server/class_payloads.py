"""The payload that each device class receives in a round, the expected update, and its padding to the shared rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtune import merging, techniques
from fedtune.files import write_bytes_atomically
from fedtune.server.algorithm_merge import declare_algorithm_upload
from fedtune.training import RunContext, get_received_shapes, get_tensor_shapes, list_tensors_of_round
from fedtune.training.drift_upload import declare_drift_upload
from fedtune.training.stream_place import declare_task_uploads
from fedtune.training.uploaded_statistics import declare_uploaded_statistics
from fedtune.wire.client_update import ClientUpdate, LowRankPair, TensorSpec, decode_tensors, pack
from fedtune.wire.masked_weights import encode_masked_state
from fedtune.wire.memory_names import add_memory
from fedtune.wire.recipe_codecs import build_up_pipeline
from fedtune.wire.update_message import UpdateLayout

__all__ = [
    "ClassPayload",
    "RoundPayloads",
    "State",
    "list_trainable_tensors",
    "make_class_payload",
    "pad_update_to_shared_rank",
]

State = Mapping[str, Tensor]
_DTYPES = {
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
_HEADER, _HEADER_ENTRY = 1024, 256
"""Bytes of a safetensors header: once, and per tensor besides its name, whose letters may be escaped."""


@dataclass(frozen=True)
class ClassPayload:
    """The state that a device class receives, and the shapes and types of the tensors that it must send."""

    wire: State
    expected_shapes: Mapping[str, tuple[int, ...]]
    extra_payload_specs: Mapping[str, TensorSpec]
    layout: UpdateLayout | None = None
    """That of coded updates; None without codecs."""

    @property
    def values(self) -> int:
        """The number of values in all deltas of an update."""
        return sum(math.prod(shape) for shape in self.expected_shapes.values())

    @property
    def most_bytes(self) -> int:
        """The largest update of this round in bytes: its tensors, and a large header; with codecs, their bound."""
        if self.layout is not None:
            return self.layout.most_bytes
        forms = {name: TensorSpec(shape) for name, shape in self.expected_shapes.items()} | dict(
            self.extra_payload_specs
        )
        values = sum(math.prod(form.shape) * _DTYPES[form.dtype].itemsize for form in forms.values())
        return values + _HEADER + sum(_HEADER_ENTRY + 6 * len(name) for name in forms)


def make_class_payload(context: RunContext, part: RunContext, sent: "RoundPayloads") -> ClassPayload:
    """Make a round's payload for clients that train with ``part``, which may be ``context`` itself."""
    state, round_number = sent.state, sent.round_number
    wire = encode_masked_state(state if part is context else _narrowed(context, part, state))
    expected = {name: tuple(wire[name].shape) for name in list_tensors_of_round(part, round_number)}
    extras = techniques.declare_extra_payload(part.techniques, part.model, round_number)
    extras |= declare_uploaded_statistics(part.model, part.recipe, expected)
    extras |= declare_task_uploads(part, round_number, list(expected))
    extras |= declare_drift_upload(part, round_number)
    extras |= declare_algorithm_upload(part.recipe, part.model, expected)
    pipeline = build_up_pipeline(part.recipe)
    forms = {name: torch.empty(one.shape, dtype=_DTYPES[one.dtype], device="meta") for name, one in extras.items()}
    layout = None if pipeline is None else UpdateLayout(pipeline, expected, forms)
    return ClassPayload(add_memory(wire, sent.memory), expected, extras, layout)


class RoundPayloads:
    """The payloads of all clients in a round. Clients of one device class share one.

    ``memory`` is what the server sends of its memory of earlier tasks.
    """

    def __init__(self, context: RunContext, state: State, round_number: int, memory: State | None = None) -> None:
        self.round_number, self.state, self.memory = round_number, state, memory or {}
        self._context, self.recipe = context, context.recipe
        self._made: dict[int, ClassPayload] = {}

    def get_for_client(self, client: int) -> ClassPayload:
        """Return the payload of a client. It is made once per device class."""
        part = self._context.for_client(client)
        if id(part) not in self._made:
            self._made[id(part)] = make_class_payload(self._context, part, self)
        return self._made[id(part)]


def list_trainable_tensors(context: RunContext, round_number: int) -> list[str]:
    """Return the names of the tensors that any device class trains, and therefore sends, in a round."""
    named = dict.fromkeys(list_tensors_of_round(context, round_number))
    for part in context.by_device_class.values():
        named |= dict.fromkeys(list_tensors_of_round(part, round_number))
    return list(named)


def pad_update_to_shared_rank(context: RunContext, part: RunContext, sent: ClientUpdate) -> None:
    """Pad the low-rank pairs of a client update to the shared rank, in its file."""
    if part is not context:
        deltas = decode_tensors(sent.path.read_bytes())
        write_bytes_atomically(
            sent.path, pack(merging.pad_to_rank(deltas, get_tensor_shapes(context.model), *_pairs(context, part)))
        )


def _narrowed(context: RunContext, part: RunContext, state: State) -> dict[str, Tensor]:
    return merging.truncate_to_rank(state, get_received_shapes(context, part), *_pairs(context, part))


def _pairs(context: RunContext, part: RunContext) -> tuple[list[LowRankPair], list[LowRankPair]]:
    return techniques.list_low_rank_pairs(context.techniques, context.model), techniques.list_low_rank_pairs(
        part.techniques, part.model
    )
