"""The message of a client update, by the codecs of the recipe, and what a device keeps for error feedback.

Error feedback goes on from the estimate of the last round whose update the server merged, as the train request says. So
both ends hold the same estimate when messages were lost, and a round that is begun again finds what it found the first
time. A device that lost its estimate begins anew, and its message says so.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fedtune.device.own_memory import FEEDBACK_PREFIX, MemoryFolder
from fedtune.recipe.schema import Recipe
from fedtune.wire.client_update import TrainRequest, pack
from fedtune.wire.recipe_codecs import MessagePlace, build_up_pipeline, uses_feedback
from fedtune.wire.update_message import encode_update

__all__ = ["encode_client_update"]

Tensors = Mapping[str, Tensor]


def encode_client_update(
    deltas: Tensors, extras: Tensors, recipe: Recipe, request: TrainRequest, folder: Path
) -> bytes:
    """Return what the device sends. With error feedback, write the estimate of this round to ``folder`` before.

    Raise StoreError if the file of the estimate was changed.
    """
    pipeline = build_up_pipeline(recipe)
    if pipeline is None:
        return pack({**deltas, **extras})
    place = MessagePlace(recipe.seed, request.round, request.client)
    if not uses_feedback(recipe):
        return encode_update(pipeline, deltas, extras, place)[0]
    memory = MemoryFolder(folder, request.run_id, prefix=FEEDBACK_PREFIX)
    number, earlier = _read_estimates(memory, request.feedback_round or 0)
    message, estimates = encode_update(pipeline, deltas, extras, place._replace(feedback_round=number), earlier)
    memory.forget_unmerged(number, request.round)
    memory.write(request.round, {**earlier, **estimates})
    return message


def _read_estimates(memory: MemoryFolder, number: int) -> tuple[int, Tensors]:
    """Return the estimates of a round and its number; 0 and none if the device has no others."""
    found = memory.read_earlier(number + 1)
    return (number, found[number]) if number in found else (0, {})
