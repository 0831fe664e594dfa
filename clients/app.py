"""The Flower ClientApp: hands an order to the local loop and its outcome back. It holds no formula."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtune.contribution import Order, Report, pack, unpack
from fedtune.sparse import compact, from_wire, masks
from fedtune.training import shapes, train, workshop

__all__ = ["app"]

app = ClientApp()


@app.train()
def train_round(message: Message, _: Context) -> Message:
    """Train from the state in the message and reply with the deltas and a report."""
    order = _order(message.content.config_records["order"])
    shop = workshop(order.recipe)
    received = unpack(message.content.array_records["state"]["safetensors"].data)
    state = from_wire(received, shapes(shop.model))
    outcome = train(
        shop.model,
        shop.techniques,
        state,
        shop.train,
        shop.clients[order.client],
        shop.recipe,
        order.round,
        order.client,
    )
    report = Report(outcome.examples, outcome.loss, outcome.seconds, outcome.saved_bytes, outcome.peak_rss)
    payload = pack({**compact(outcome.delta, masks(state)), **outcome.extras})
    deltas = Array(dtype="uint8", shape=(len(payload),), stype="safetensors", data=payload)
    content = RecordDict({"delta": ArrayRecord({"safetensors": deltas}), "report": MetricRecord(asdict(report))})
    return Message(content, reply_to=message)


def _order(record: Mapping[str, Any]) -> Order:
    return Order(str(record["recipe"]), int(record["round"]), int(record["client"]))
