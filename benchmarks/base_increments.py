"""Claim: merges that write into the base weights send a device a sixth of the bytes that the whole base would be.

MiniLM, four clients, rank 8, a few steps each: the bytes down to one device, round by round, as a run records them,
beside the bytes of the whole state of that round. ``seconds`` is the processor time in which a device with one thread
adds one round's increments to its base, and that of the digest which tells that it has the server's bits.

Run: python -m benchmarks.base_increments [--rounds 12]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import save
from fedtune import checkpoint
from fedtune.contribution import packed_size
from fedtune.merging import add_increments, split_increments
from fedtune.stored_state import StoredState
from fedtune.tracking import Store, file_url

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "devices=[{name: phone, count: 4, memory: 512MB}]",
    "train.techniques=[{lora: {exact: remainder, rank: 8}}]",
    "train.batch=8",
    "train.length=24",
    "train.steps=3",
    "data.limit=800",
    "federation.quorum=4",
    "evaluation={every: 1000, examples: 20}",
    "checkpoints.keep=all",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    save("base_increments", {merge: measured(merge, chosen.rounds) for merge in ("flora", "fedex-lora")})


def measured(merge: str, rounds: int) -> dict[str, Any]:
    """Bytes by round and in all, for one device of a run, and what the increments of the last round cost it."""
    with tempfile.TemporaryDirectory() as folder:
        down, states = simulated(merge, rounds, Path(folder))
        whole = [packed_size(state) for state in states[:-1]]
        found = {"down": down, "whole": whole, "down_all": sum(down), "whole_all": sum(whole)}
        return {**found, "times": round(sum(whole) / sum(down), 2), **cost(states[-2:])}


def simulated(merge: str, rounds: int, folder: Path) -> tuple[list[int], list[StoredState]]:
    """Bytes down to the first client, and the checkpoints from round 0 on."""
    settings = (*SETTINGS, f"merge=[{merge}]", f"federation.rounds={rounds}")
    command = [sys.executable, "-m", "fedtune.cli.main", "simulate", str(ROOT / "recipes" / "sentiment.yaml")]
    command += [part for setting in settings for part in ("--set", setting)]
    url = file_url(folder / "runs.sqlite")
    subprocess.run([*command, "--store", url], check=True, env={**os.environ, "FEDTUNE_HOME": str(folder)})
    with Store.open(url) as store:
        [run] = store.runs()
        done = store.rounds(run.id)
    down = [record.contributions[0].bytes_down for record in done[1:]]
    return down, [StoredState(folder / "runs" / one.checkpoint.path) for one in done if one.checkpoint]


def cost(states: list[StoredState]) -> dict[str, Any]:
    """Processor seconds of adding the last round's increments, and of the digest."""
    before, after = states
    [path] = after.path.parent.glob(f"increments-{after.path.stem[-4:]}.safetensors")
    [step] = split_increments(StoredState(path))[1]
    base = {name: before[name].clone() for name in step}
    started = time.process_time()
    made = {name: add_increments(tensor, name, [step]) for name, tensor in base.items()}
    added = time.process_time()
    digest = checkpoint.digest(made)
    seconds = {"add": round(added - started, 3), "digest": round(time.process_time() - added, 3)}
    return {"seconds": seconds, "same_bits": digest == checkpoint.digest({name: after[name] for name in made})}


if __name__ == "__main__":
    main()
