"""Claim: with 30 % of its labels replaced by noise, a model is more accurate with error-norm-truncation than without.

A small Llama learns a table of two tokens to one, behind four random tokens by which it can remember the noise.
Accuracy and loss are those on 1000 clean examples after the last step, over three seeds, for each threshold.

Run: python -m benchmarks.noisy_labels [--steps N]
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import save
from fedtune import techniques
from fedtune.recipe.schema import Unit
from fedtune.tasks import get_task
from fedtune.training import compute_step_loss, use_cpu_threads

EXAMPLES, CLEAN, BATCH, NOISE, START = 800, 1000, 64, 0.3, 0.3
KEYS, FILLERS, ANSWERS = 8, 16, 16
SEEDS = (0, 1, 2)
THRESHOLDS = (None, 1.35, 1.3, 1.25)
"""None: plain training."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=800)
    steps = parser.parse_args().steps
    rows = []
    with use_cpu_threads(1):
        for seed in SEEDS:
            for threshold in THRESHOLDS:
                rows.append({"seed": seed, "threshold": threshold, **train(seed, threshold, steps)})
                print(rows[-1], file=sys.stderr, flush=True)
    save("noisy_labels", {"steps": steps, "rows": rows, "mean_accuracy": mean_accuracies(rows)})


def mean_accuracies(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By threshold, over the seeds."""
    return {
        str(threshold): sum(row["accuracy"] for row in rows if row["threshold"] == threshold) / len(SEEDS)
        for threshold in THRESHOLDS
    }


def examples(count: int, noise: float, table: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids [n, 7] that end in an answer, some of them random, and the true answers [n]."""
    keys = torch.randint(KEYS, (count, 2), generator=random)
    fillers = torch.randint(FILLERS, (count, 4), generator=random) + KEYS
    answers = table[keys[:, 0], keys[:, 1]] + KEYS + FILLERS
    strange = torch.randint(ANSWERS, (count,), generator=random) + KEYS + FILLERS
    given = torch.where(torch.rand(count, generator=random) < noise, strange, answers)
    return torch.cat([fillers, keys, given[:, None]], 1), answers


def train(seed: int, threshold: float | None, steps: int) -> dict[str, float]:
    """Accuracy and loss on clean examples."""
    random, task = torch.Generator().manual_seed(seed), get_task("text-generation")
    table = torch.randint(ANSWERS, (KEYS, KEYS), generator=random)
    ids, _ = examples(EXAMPLES, NOISE, table, random)
    model = build_model(seed)
    truncation = [Unit(name="error-norm-truncation", settings={"threshold": threshold, "start": START})]
    chosen = techniques.build_techniques([Unit(name="full"), *(truncation if threshold else [])])
    techniques.apply_techniques(chosen, model, task, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        rows = ids[torch.randint(EXAMPLES, (BATCH,), generator=random)]
        labels = rows.clone()
        labels[:, :-1] = -100
        batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": labels}
        techniques.begin_step(chosen, model, batch, step / steps)
        compute_step_loss(task, model, batch).backward()
        optimiser.step()
        optimiser.zero_grad()
    return score(model, *examples(CLEAN, 0.0, table, random))


def build_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=KEYS + FILLERS + ANSWERS, use_cache=False, **size, **heads)
    model: LlamaForCausalLM = LlamaForCausalLM(config)
    model.train()
    return model


@torch.no_grad()
def score(model: LlamaForCausalLM, ids: Tensor, answers: Tensor) -> dict[str, float]:
    logits = model.eval()(input_ids=ids).logits[:, -2]
    accuracy = float((logits.argmax(-1) == answers).float().mean())
    return {"accuracy": accuracy, "loss": float(F.cross_entropy(logits, answers))}


if __name__ == "__main__":
    main()
