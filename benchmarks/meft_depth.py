"""Claims: what MEFT keeps does not grow with depth within a stretch of blocks, and its peak is a fraction of others'.

depth     the blocks alone, 6, 12 and 24 of them, MiniLM's at 16 x 128 and SmolLM2's at 2 x 128. At a factor of 1/2 all
          are one stretch; at the default of 1/8 a stretch is 16 blocks long, so that 24 have one cut, two streams more.
          A checkpointed stack stands beside.
whole     whole steps: MiniLM at 16 x 128 with its classifier, SmolLM2 at 2 x 128 with a fused head over its vocabulary,
          against full fine-tuning and LoRA with per-layer checkpointing and the same head.
stack     SmolLM2's decoder stack at 2 x 128 without a head.

``kept_bytes`` at the end of the forward pass, ``peak_bytes`` over the step (unique storages, without parameters and
their gradients), ``seconds`` the median of several further steps. One fresh process per case on one thread.

Run: python -m benchmarks.meft_depth [--short]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.report import save
from fedtune import models, techniques
from fedtune.memory import StorageMeter
from fedtune.recipe.schema import ModelSettings, Unit
from fedtune.tasks import Task, get_task
from fedtune.techniques import begin_round
from fedtune.training import compute_step_loss, set_train_mode, use_cpu_threads

BATCHES = {"minilm": (16, 128), "smollm2": (2, 128)}
TASKS: dict[str, Task] = {"minilm": get_task("text-classification"), "smollm2": get_task("text-generation")}
BLOCKS = {"minilm": "bert.encoder.layer", "smollm2": "model.layers"}
SETTINGS: dict[str, dict[str, Any]] = {
    "meft in one stretch": {"factor": 0.5},
    "meft in 2 pieces": {"pieces": 2},
    "fused-cross-entropy": {"chunk": 32},
}
"""Settings by the name a technique has in the table. The head's pieces are so small that the blocks make the peak."""


def cases(short: bool) -> list[dict[str, Any]]:
    depths = [
        {"part": "depth", "model": model, "blocks": blocks, "techniques": joined}
        for model in BATCHES
        for joined in ("meft in one stretch", "meft", "lora+gradient-checkpointing")
        for blocks in (6, 12, 24)
    ]
    wholes = [
        {"part": "whole", "model": model, "blocks": None, "techniques": joined + head}
        for model, head in (("minilm", ""), ("smollm2", "+fused-cross-entropy"))
        for joined in (
            "full",
            "full+gradient-checkpointing",
            "lora",
            "lora+gradient-checkpointing",
            "meft",
            "meft in 2 pieces",
        )
    ]
    stacks = [
        {"part": "stack", "model": "smollm2", "blocks": None, "techniques": joined}
        for joined in ("full", "lora", "lora+gradient-checkpointing", "meft", "meft in 2 pieces")
    ]
    return [*depths[:3], *wholes[3:6]] if short else [*depths, *wholes, *stacks]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="six cases alone")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(**json.loads(arguments.case))))
    else:
        save("meft_depth", {"rows": [in_fresh_process(case) for case in cases(arguments.short)]})


def in_fresh_process(case: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.meft_depth", "--case", json.dumps(case)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(case | found, file=sys.stderr, flush=True)
    return {**case, **found}


def measured(part: str, model: str, blocks: int | None, techniques: str) -> dict[str, Any]:
    built = prepared(model, blocks, techniques)
    set_train_mode(built)
    step = whole_step(built, model) if part == "whole" else stack_step(built, model)
    with use_cpu_threads(1):
        with StorageMeter(excluded=[*built.parameters(), *built.buffers()]) as meter:
            loss = step()
            kept = meter.current_bytes
            loss.backward()
            del loss
        seconds = [timed(built, step) for _ in range(5)]
    trainable = sum(p.numel() for p in built.parameters() if p.requires_grad)
    return {
        "kept_bytes": kept,
        "peak_bytes": meter.peak_bytes,
        "seconds": statistics.median(seconds),
        "trainable": trainable,
    }


def timed(model: nn.Module, step: Callable[[], Tensor]) -> float:
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    step().backward()
    return time.perf_counter() - started


def prepared(name: str, blocks: int | None, joined: str) -> PreTrainedModel:
    labels = ("bad", "good") if name == "minilm" else ()
    model = models.load_model(ModelSettings(source=f"sample:{name}"), TASKS[name], labels, seed=0)
    assert isinstance(model, PreTrainedModel)
    if blocks is not None:
        resize(model, BLOCKS[name], blocks)
    units = [Unit(name=one.split()[0], settings=SETTINGS.get(one, {})) for one in joined.split("+")]
    chosen = techniques.build_techniques(units)
    techniques.apply_techniques(chosen, model, TASKS[name], 0)
    begin_round(chosen, model, 1)
    return model


def resize(model: PreTrainedModel, path: str, count: int) -> None:
    """The first ``count`` blocks, again from the first where there are not as many."""
    owner, _, name = path.rpartition(".")
    found = list(model.get_submodule(path).children())
    state = [found[at % len(found)].state_dict() for at in range(count)]
    made = [type(found[0])(model.config, at) for at in range(count)]
    for block, weights in zip(made, state, strict=True):
        block.load_state_dict(weights)
        block.requires_grad_(False)
    model.config.num_hidden_layers = count
    model.get_submodule(owner).add_module(name, nn.ModuleList(made))


def inputs(name: str) -> dict[str, Tensor]:
    rows, length = BATCHES[name]
    ids = torch.randint(1000, 30000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def whole_step(model: PreTrainedModel, name: str) -> Callable[[], Tensor]:
    batch = inputs(name)
    batch["labels"] = batch["input_ids"] if name == "smollm2" else torch.arange(len(batch["input_ids"])) % 2
    return lambda: compute_step_loss(TASKS[name], model, batch)


def stack_step(model: PreTrainedModel, name: str) -> Callable[[], Tensor]:
    """The backbone, with a loss that keeps nothing but its output."""
    batch = inputs(name)

    def step() -> Tensor:
        states: Tensor = model.base_model(**batch).last_hidden_state
        return states.pow(2).mean()

    return step


if __name__ == "__main__":
    main()
