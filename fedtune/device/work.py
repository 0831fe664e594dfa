"""One client's round as a function of what it is sent: in a simulation and on a device alike."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.contribution import FEWEST, Order, OwnScore, Report, pack, unpack
from fedtune.device import own_tensors
from fedtune.device.held_base import with_base
from fedtune.device.private import private, withheld
from fedtune.sparse import compact, from_wire, masks
from fedtune.stored_state import StoredState
from fedtune.training import Workshop, shapes, train
from fedtune.training.held_out import count_held_out

__all__ = ["work"]


def work(
    order: Order,
    payload: bytes | Path,
    shop: Workshop,
    rows: NDArray[np.int64],
    folder: Path,
    micro: int | None = None,
) -> tuple[bytes, Report]:
    """Train from the state in ``payload`` on ``rows`` of the workshop's training part: the deltas and a report.

    A payload that is a file is read tensor by tensor, so that no copy of the state is held.

    What the client keeps for itself rests in ``folder``, which is its own in this run. At most ``micro`` examples go
    through the model at a time. A loss or a score over fewer than ``FEWEST`` examples is not told.
    """
    part = shop.of(order.client)
    sent = StoredState(payload) if isinstance(payload, Path) else unpack(payload)
    state = from_wire(with_base(order, sent, part, folder), shapes(part.model))
    own = {**part.own, **own_tensors.load(folder, order.round)} if part.own else {}
    outcome = train(
        part.model, part.techniques, state, shop.train, rows, part.recipe, order.round, order.client, own, micro
    )
    if outcome.own:
        own_tensors.save(folder, order.round, outcome.own)
    held_out = count_held_out(len(rows), part.recipe.evaluation.own)
    loss = outcome.loss if len(rows) - held_out >= FEWEST else math.nan
    scores = _told(outcome.own_score, outcome.trained_score) if held_out >= FEWEST else {}
    cost = outcome.examples, loss, outcome.seconds, outcome.saved_bytes, outcome.peak_rss
    report = Report(*cost, micro_batch=micro or 0, **scores)
    deltas, privacy = compact(outcome.delta, masks(state)), part.recipe.privacy
    if privacy is None:
        return pack({**deltas, **outcome.extras}), report
    sent = private(deltas, outcome.extras, privacy, order, folder)
    return pack(sent), withheld(report) if privacy.where == "client" else report


def _told(before: OwnScore, after: OwnScore) -> dict[str, Any]:
    """Fields of a report; with nothing held out there is nothing to tell."""
    if not before.predictions:
        return {}
    first = {"own_predictions": before.predictions, "own_loss": before.loss, "own_accuracy": before.accuracy}
    return {**first, "own_more": list(before.more), "own_after": [after.loss, after.accuracy, *after.more]}
