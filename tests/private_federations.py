"""Federations with privacy, small enough for every test, and what can be read off their runs."""

from collections.abc import Callable
from pathlib import Path

from flwr.app import Message
from torch import Tensor

from fedtune import checkpoint
from fedtune import paths as homes
from fedtune.recipe.schema import Recipe
from fedtune.wire.client_update import decode_tensors
from tests.federations import Ended, order_of, trivial

__all__ = ["CLIP", "NOISE", "Sent", "epsilons", "keeping", "key_of", "private", "state"]

CLIP, NOISE = 0.0385, 1.5
Sent = dict[tuple[int, int], dict[str, Tensor]]


def private(where: str, *overrides: str) -> Recipe:
    """Four clients, two rounds; of their norms some are above the bound and some below."""
    return trivial(
        f"privacy.clipping_norm={CLIP}",
        f"privacy.noise_multiplier={NOISE}",
        f"privacy.noise_added_by={where}",
        *overrides,
    )


def keeping(sent: Sent) -> Callable[[Message, Message], Message]:
    """Notes what each client sends, by round and client, and passes it on."""

    def note(message: Message, reply: Message) -> Message:
        sent[order_of(message)] = decode_tensors(reply.content.array_records["delta"]["safetensors"].data)
        return reply

    return note


def state(ended: Ended, number: int) -> dict[str, Tensor]:
    saved = ended.rounds[number].checkpoint
    assert saved is not None
    return checkpoint.read_checkpoint(homes.get_runs_folder() / saved.path, saved.sha256)


def key_of(run: str, client: int | None = None) -> Path:
    """Where the server's secret lies, or a client's."""
    folder = homes.get_runs_folder() / run
    return (folder if client is None else folder / "own" / f"client-{client:06d}") / "noise.key"


def epsilons(ended: Ended) -> list[float]:
    found = [[m.value for m in r.metrics if (m.split, m.name) == ("privacy", "epsilon")] for r in ended.rounds]
    return [value for values in found for value in values]
