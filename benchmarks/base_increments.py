"""Claim: merges that write into the base weights send a device a sixth of the bytes that the whole base would be.

MiniLM, four clients a round, rank 8. What goes down depends on shapes and ranks alone, so nothing is trained: the
clients send random deltas, which the server merges, logs and sends on as in a run. ``down`` are the bytes that a client
of every round is sent, round by round, ``away`` those of one that was last merged in round 1, ``whole`` those of the
whole state. ``stateless`` is what would be sent if devices kept nothing: all increments since the start, or the whole
state where that is less. ``seconds`` is processor time of one round, one thread: the merge, and what a device does to
have its base: adding, the digest that tells it has the server's bits, and writing the file.

Run: python -m benchmarks.base_increments [--rounds 16]
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.report import save
from fedtune import checkpoint, merging, techniques
from fedtune.device.held_base import with_base
from fedtune.merging import MergeContext
from fedtune.recipe.yaml_file import read_recipe
from fedtune.server.bases import Bases
from fedtune.server.class_payloads import RoundPayloads, list_trainable_tensors
from fedtune.server.client_device import ClientDevice
from fedtune.server.downloads import Download, Downloads
from fedtune.server.replies import make_missing_record
from fedtune.simulation import resolve_recipe
from fedtune.tracking import ClientRecord
from fedtune.training import RunContext, clear_run_context, get_model_state, get_run_context
from fedtune.wire.client_update import ClientUpdate, TrainRequest, decode_tensors, pack, packed_size
from fedtune.wire.stored_state import StoredState

ROOT = Path(__file__).parents[1]
CLIENTS, AWAY, RANK = 4, 4, 8
State = Mapping[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=16)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    save("base_increments", {merge: measured(merge, chosen.rounds) for merge in ("flora", "fedex-lora")})


def measured(merge: str, rounds: int) -> dict[str, Any]:
    """Bytes by round and in all; what a round costs in processor time, the last one taken."""
    settings = [
        f"devices=[{{name: phone, count: {CLIENTS + 1}, memory: 512MB}}]",
        f"train.techniques=[{{lora: {{trained_factors: both-and-base, rank: {RANK}}}}}]",
        f"merge=[{merge}]",
        "federation.quorum=1",
    ]
    clear_run_context()
    shop = get_run_context(resolve_recipe(read_recipe(ROOT / "recipes" / "sentiment.yaml", settings)).model_dump_json())
    with tempfile.TemporaryDirectory() as folder:
        rows = list(federation(shop, rounds, Path(folder)))
    down, whole, added = [row.down for row in rows], rows[0].whole, rows[1].down - rows[0].down
    stateless = [min(down[0] + added * number, whole) for number in range(rounds)]
    sums = {"down": sum(down), "stateless": sum(stateless), "whole": whole * rounds}
    seconds = {"merge": round(rows[-1].merging, 3), "device": round(rows[-1].device, 3)}
    away = [row.away for row in rows]
    return {"down": down, "away": away, "whole": whole, "stateless": stateless, "sums": sums, "seconds": seconds}


class Row(NamedTuple):
    """Bytes to a client of all rounds, to one that is away, and whole; processor seconds of the merge, of a device."""

    down: int
    away: int
    whole: int
    merging: float
    device: float


def federation(shop: RunContext, rounds: int, folder: Path) -> Iterator[Row]:
    """Round by round, as the server's loop does it."""
    state = stored(get_model_state(shop.model, shop.shared_names), folder, 0)
    bases = Bases(shop, folder, state, [])
    for number in range(1, rounds + 1):
        downloads = Downloads(RoundPayloads(shop, state, number), bases, None, deployed=True)
        got, away = downloads.get_for_client(0), downloads.get_for_client(AWAY)
        device = received(shop, got, number, folder / "device")
        sent = contributions(shop, state, number, folder)
        evidence = MergeContext(
            low_rank_pairs=techniques.list_low_rank_pairs(shop.techniques, shop.model), round_number=number
        )
        started = time.process_time()
        merged = merging.merge_round(
            merging.build_pipeline(shop.recipe.merge), state, list_trainable_tensors(shop, number), sent, evidence
        )
        seconds = time.process_time() - started
        bases.record_merge(number, state, merged.state, merged.increments)
        bases.record_commit(number, records(CLIENTS if number > 1 else CLIENTS + 1))
        yield Row(got.size, away.size, packed_size(state), seconds, device)
        state = stored(merged.state, folder, number)


def stored(state: State, folder: Path, number: int) -> StoredState:
    """The state as a round leaves it."""
    path = folder / f"round-{number:04d}.safetensors"
    checkpoint.write_checkpoint(path, state)
    return StoredState(path)


def received(shop: RunContext, got: Download, number: int, folder: Path) -> float:
    """Seconds of a device until it has its base, which is checked by its digest."""
    assert isinstance(got.payload, bytes)
    assert got.held_digest, "the increments are fewer bytes in each round"
    started = time.process_time()
    with_base(
        TrainRequest("", number, 0, "run", base_digest=got.base_digest, held_digest=got.held_digest),
        decode_tensors(got.payload),
        shop,
        folder,
    )
    return time.process_time() - started


def contributions(shop: RunContext, state: State, number: int, folder: Path) -> list[ClientUpdate]:
    """Random deltas of each client, of about the size that some steps make."""
    names, found = list_trainable_tensors(shop, number), []
    for client in range(CLIENTS):
        random = torch.Generator().manual_seed(1000 * number + client)
        path = folder / f"{client}.safetensors"
        path.write_bytes(pack({name: 1e-3 * torch.randn(state[name].shape, generator=random) for name in names}))
        found.append(ClientUpdate(client, 10 + client, path))
    return found


def records(clients: int) -> list[ClientRecord]:
    """That so many were merged."""
    return [
        replace(make_missing_record(client, ClientDevice("phone"), 0, ""), status="merged") for client in range(clients)
    ]


if __name__ == "__main__":
    main()
