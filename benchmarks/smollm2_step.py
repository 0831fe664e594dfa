"""The whole step of a small language model with a large vocabulary: what it takes beyond the weights, and how long.

SmolLM2 (135 M parameters, 30 blocks, 49,152 words) in fp32, one text of 1024 random tokens, one thread, each case in a
fresh process. A step is forward, backward, clipping and AdamW. The second step is metered: ``peak_bytes`` is the most
that is held at one time of all it makes, activations, logits, gradients of activations and temporaries alike.
Left out and given beside it, since they are what trained parameters bring with them in any case: ``gradient_bytes``,
the parameters' gradients, and ``optimiser_bytes``, the two moments of each. ``kept_bytes`` is what is held between
forward and backward pass. ``seconds`` is the median of three more steps, unmetered; ``rss_over_loaded_bytes`` the
process's own peak during these over what it held before the first step.

Run: python -m benchmarks.smollm2_step
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import save
from fedtune import models, techniques
from fedtune.memory import StorageMeter, peak_rss, reset_peak_rss
from fedtune.recipe.schema import ModelSettings, Unit
from fedtune.tasks import get_task
from fedtune.techniques import Technique, begin_round, begin_step, list_trainable_tensors
from fedtune.training import compute_step_loss, set_train_mode, use_cpu_threads

LENGTH = 1024
TASK = get_task("text-generation")
CASES = [
    "lora",
    "lora+fused-cross-entropy",
    "lora+gradient-checkpointing",
    "lora+gradient-checkpointing+fused-cross-entropy",
    "lora+selective-checkpointing",
    "lora+selective-checkpointing+fused-cross-entropy",
    "meft",
    "meft+fused-cross-entropy",
]
GOALS = {"meft+fused-cross-entropy": "peak_bytes at most 110 MiB", "lora": "peak_bytes over 1 GiB"}


def main() -> None:
    save("smollm2_step", {"tokens": LENGTH, "goals": GOALS, "rows": [in_fresh_process(case) for case in CASES]})


def in_fresh_process(case: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.smollm2_step", case]
    row: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(row, file=sys.stderr, flush=True)
    return row


def measured(case: str) -> dict[str, Any]:
    chosen = techniques.build_techniques([Unit(name=name) for name in case.split("+")])
    model = models.load_model(ModelSettings(source="sample:smollm2"), TASK, (), seed=0)
    techniques.apply_techniques(chosen, model, TASK, 0)
    begin_round(chosen, model, 1)
    set_train_mode(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)
    batch = a_text()
    reset_peak_rss()
    loaded = peak_rss()
    with use_cpu_threads(1):
        step(model, chosen, optimiser, batch)
        row = metered(model, chosen, optimiser, batch)
        seconds = [timed(lambda: step(model, chosen, optimiser, batch)) for _ in range(3)]
    return {
        "techniques": case,
        **row,
        "seconds": statistics.median(seconds),
        "rss_over_loaded_bytes": peak_rss() - loaded,
        "trained_parameters": sum(model.get_parameter(name).numel() for name in list_trainable_tensors(model)),
    }


def a_text() -> dict[str, Tensor]:
    ids = torch.randint(0, 49_152, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def metered(
    model: nn.Module, chosen: tuple[Technique, ...], optimiser: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> dict[str, int]:
    moments = [kept for state in optimiser.state.values() for kept in state.values() if isinstance(kept, Tensor)]
    parameters = list(model.parameters())
    with StorageMeter(excluded=[*parameters, *model.buffers(), *moments]) as meter:
        begin_step(chosen, model, batch, 0.0)
        loss = compute_step_loss(TASK, model, batch)
        kept = meter.current_bytes
        loss.backward()
        gradients = meter.gradient_bytes
        update(model, optimiser)
    return {
        "kept_bytes": kept,
        "peak_bytes": meter.peak_bytes,
        "gradient_bytes": gradients,
        "optimiser_bytes": sum(moment.nbytes for moment in moments),
    }


def step(
    model: nn.Module, chosen: tuple[Technique, ...], optimiser: torch.optim.Optimizer, batch: dict[str, Tensor]
) -> None:
    begin_step(chosen, model, batch, 0.0)
    compute_step_loss(TASK, model, batch).backward()
    update(model, optimiser)


def update(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measured(sys.argv[1])))
    else:
        main()
