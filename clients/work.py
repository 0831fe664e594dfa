"""One client's round as a function of what it is sent: in a simulation and on a device alike."""

import numpy as np
from numpy.typing import NDArray

from fedtune.contribution import Order, Report, pack, unpack
from fedtune.sparse import compact, from_wire, masks
from fedtune.training import Workshop, shapes, train

__all__ = ["work"]


def work(order: Order, payload: bytes, shop: Workshop, rows: NDArray[np.int64]) -> tuple[bytes, Report]:
    """Train from the state in ``payload`` on ``rows`` of the workshop's training part: the deltas and a report."""
    state = from_wire(unpack(payload), shapes(shop.model))
    outcome = train(shop.model, shop.techniques, state, shop.train, rows, shop.recipe, order.round, order.client)
    report = Report(outcome.examples, outcome.loss, outcome.seconds, outcome.saved_bytes, outcome.peak_rss)
    return pack({**compact(outcome.delta, masks(state)), **outcome.extras}), report
