"""The Flower ClientApp of a simulation: hands an order to ``work`` and its outcome back."""

from dataclasses import asdict

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients import records
from clients.work import work
from fedtune import home
from fedtune.contribution import Order
from fedtune.training import workshop

__all__ = ["app"]

app = ClientApp()


@app.train()
def train_round(message: Message, _: Context) -> Message:
    """Train from the state in the message and reply with the deltas and a report."""
    order = Order(**records.order(message.content))  # type: ignore[arg-type]
    shop = workshop(order.recipe)
    own = home.runs() / order.run / "own" / f"client-{order.client:06d}"
    state = records.state_file(message.content) or records.state(message.content)
    deltas, report = work(order, state, shop, shop.clients[order.client], own)
    return Message(records.answer(deltas, asdict(report)), reply_to=message)
