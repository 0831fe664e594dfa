"""Rounds of one client of a stream of digits, for the tests of methods that keep examples."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedtune.continual import MethodRound
from fedtune.device.local_round import run_local_round
from fedtune.device.own_memory import MemoryFolder
from fedtune.recipe.schema import Recipe
from fedtune.training import ClientRound, RunContext, clear_run_context, get_model_state, get_run_context
from fedtune.training.received_state import receive_state
from fedtune.training.stream_place import make_stream_round
from fedtune.training.stream_training import begin_methods
from fedtune.wire.client_update import TrainRequest, decode_tensors
from tests.streams import CLASSES, resolve_stream

__all__ = ["CLIENT", "STREAM", "begin_client", "make_recipe", "read_files", "train_client"]

STREAM = {**CLASSES, "tasks": {"size": 2, "rounds": 2}}
"""Ten digits, two at a time, two rounds each."""
CLIENT = 1


def make_recipe(*memory: Any, own_memory: Mapping[str, Any] | None = None, **changes: Any) -> Recipe:
    """The stream of digits with methods; ``changes`` are settings of the stream."""
    return resolve_stream({**STREAM, "memory": list(memory), "own_memory": dict(own_memory or {}), **changes})


def begin_client(
    recipe: Recipe, number: int, stored: Mapping[int, Mapping[str, Tensor]] | None = None
) -> tuple[ClientRound, MethodRound]:
    """The client's round with its state received, and that of its one method."""
    context: RunContext = get_run_context(recipe.model_dump_json())
    rows = context.client_rows[CLIENT]
    begun = make_stream_round(context, rows, number, CLIENT)
    assert begun is not None
    stream = replace(begun, stored=stored or {})
    client = ClientRound(
        context.model, context.techniques, recipe, context.train, stream.rows, number, CLIENT, stream=stream
    )
    receive_state(client, get_model_state(context.model, context.shared_names))
    client = begin_methods(client)
    [method] = client.method_rounds
    return client, method


def train_client(recipe: Recipe, folder: Path, *rounds: int, run: str = "run") -> dict[str, Tensor]:
    """The deltas of the last of some rounds, each from the untrained model, with what is stored in ``folder``."""
    clear_run_context()
    context = get_run_context(recipe.model_dump_json())
    start = {name: one.clone() for name, one in get_model_state(context.model, context.shared_names).items()}
    deltas: dict[str, Tensor] = {}
    for number in rounds:
        request = TrainRequest(recipe.model_dump_json(), number, CLIENT, run)
        payload, _ = run_local_round(request, start, context, context.client_rows[CLIENT], folder)
        deltas = dict(decode_tensors(payload))
    return deltas


def read_files(folder: Path, run: str = "run", key: bytes | None = None) -> dict[int, dict[str, Tensor]]:
    """The tensors of all memory files, by visit."""
    memory = MemoryFolder(folder, run, key=key)
    visits = [int(path.stem.removeprefix("memory-")) for path in sorted(folder.glob("memory-*.safetensors"))]
    return {visit: memory.read_earlier(visit + 1)[visit] for visit in visits}
