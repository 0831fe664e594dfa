"""The messages of an exchange: what each client is ordered to do, and the state it begins with."""

import json
from collections.abc import Sequence

from flwr.app import Message

from fedtune import home
from fedtune.contribution import Order
from fedtune.server.crew import Crew
from fedtune.server.exchange import messages_for
from fedtune.server.parts import Parts
from fedtune.server.reply_limit import OVERHEAD, raise_reply_limit
from fedtune.training import Workshop

__all__ = ["make_messages"]


def make_messages(
    shop: Workshop, run: str, crew: Crew, clients: Sequence[int], parts: Parts, *, scoring: bool = False
) -> dict[int, Message]:
    """A message to each client, in client order; all of one class share one copy of the state.

    They are to train, or with ``scoring`` only to score.
    """
    labels = json.dumps(shop.corpus.labels)
    order = Order(shop.recipe.model_dump_json(), parts.number, 0, labels, run, scoring)
    most = max((parts.of(client).most_bytes for client in clients), default=0)
    crew.expect(most)
    found: dict[int, Message] = {}
    if crew.deployed:
        raise_reply_limit(home.runs() / run, most + OVERHEAD)
    for payload in {id(parts.of(client)): parts.of(client).payload for client in clients}.values():
        own = [client for client in clients if parts.of(client).payload is payload]
        found |= messages_for(own, crew.nodes, order, payload)
    return dict(sorted(found.items()))
