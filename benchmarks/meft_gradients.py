"""Claim: MEFT's gradients are those of stored activations to the bit, deep, in fp32 and bf16, with dropout on.

Every variant in exact mode, and beside it the published floating-point mode, whose errors are why there is the other.
Each model takes one step twice, reversible and with every activation stored, from the same adapters, moved away from
their start. ``equal`` counts the parameters whose gradients are the same bits; ``gradient_error`` is the largest
relative difference in norm over parameters, ``rebuilt_error`` that of the first block's rebuilt input; null is beyond
all numbers. ``start_loss`` is the loss of the untrained two-stream model on texts, beside that of its pretrained base.

Models: MiniLM (6 blocks), the same blocks twice (12), SmolLM2 (30). Run: python -m benchmarks.meft_gradients [--short]
"""

import argparse
import math
import sys
import warnings
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.report import save
from fedtune import models, techniques
from fedtune.recipe.schema import ModelSettings, Unit
from fedtune.tasks import Task, get_task
from fedtune.training import set_train_mode, use_cpu_threads

MODELS = {"minilm": ("sample:minilm", 1), "minilm-12": ("sample:minilm", 2), "smollm2": ("sample:smollm2", 1)}
"""Source, and how many times its blocks stand one after the other."""
EXACT: list[dict[str, Any]] = [{"variant": one} for one in ("diff", "meft1", "meft2", "meft3")]
FLOAT: list[dict[str, Any]] = [{"variant": one, "mode": "float", "factor": 0.1} for one in ("diff", "meft1", "meft3")]
TEXTS = [
    "The film was great, and the second half even better than the first one, which nobody in the hall expected.",
    "The battery died after two days, and the shop would not take the phone back; I shall not buy there again.",
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="MiniLM and two variants alone")
    short = parser.parse_args().short
    rows, starts = [], []
    with use_cpu_threads(1):
        for name in list(MODELS)[: 1 if short else None]:
            starts += [start(name)] if name == "smollm2" else []
            for dtype in ("float32", "bfloat16"):
                for settings in (EXACT + FLOAT)[:: 4 if short else 1]:
                    rows.append(compared(name, dtype, settings))
                    print(rows[-1], file=sys.stderr, flush=True)
    save("meft_gradients", {"rows": rows, "start": starts})


def task_of(name: str) -> Task:
    return get_task("text-generation" if name == "smollm2" else "text-classification")


def loaded(name: str, dtype: str) -> PreTrainedModel:
    source, times = MODELS[name]
    labels = () if name == "smollm2" else ("bad", "good")
    chosen = ModelSettings.model_validate({"source": source, "dtype": dtype})
    model = models.load_model(chosen, task_of(name), labels, seed=0)
    assert isinstance(model, PreTrainedModel)
    if times > 1:
        encoder = model.get_submodule("bert.encoder")
        blocks = list(encoder.get_submodule("layer").children())
        encoder.add_module("layer", nn.ModuleList(deepcopy(block) for _ in range(times) for block in blocks))
    return model


def a_batch(name: str) -> dict[str, Tensor]:
    found = models.load_tokenizer(ModelSettings(source=MODELS[name][0]))(TEXTS, padding=True, return_tensors="pt")
    ids, mask = found["input_ids"], found["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100) if name == "smollm2" else torch.tensor([1, 0])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def prepared(name: str, dtype: str, settings: dict[str, Any]) -> PreTrainedModel:
    """With meft applied and its adapters moved."""
    model = loaded(name, dtype)
    chosen = techniques.build_techniques([Unit(name="meft", settings=settings)])
    random = torch.Generator().manual_seed(5)
    for trained in techniques.apply_techniques(chosen, model, task_of(name), 0):
        parameter = model.get_parameter(trained)
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=random).to(parameter.dtype)
    return model


def gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    set_train_mode(model)
    torch.manual_seed(3)
    model(**batch).loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def compared(name: str, dtype: str, settings: dict[str, Any]) -> dict[str, Any]:
    batch = a_batch(name)
    stored = gradients(prepared(name, dtype, {**settings, "stored_activations": True}), batch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = gradients(prepared(name, dtype, settings), batch)
    return {
        "model": name,
        "dtype": dtype,
        "mode": "exact",
        **settings,
        "parameters": len(stored),
        "equal": sum(torch.equal(found[one], stored[one]) for one in stored),
        "gradient_error": largest([float((found[one] - stored[one]).norm() / stored[one].norm()) for one in stored]),
        "rebuilt_error": largest([float(word) for word in rebuilt(said)]),
    }


def largest(errors: list[float]) -> float | None:
    """None where the numbers overflowed."""
    return max(errors, default=0.0) if all(math.isfinite(error) for error in errors) else None


def rebuilt(said: list[warnings.WarningMessage]) -> Iterator[str]:
    for warning in said:
        _, _, after = str(warning.message).partition("relative error of ")
        if after:
            yield after.split(",")[0]


def start(name: str) -> dict[str, Any]:
    """Losses before the first step."""
    base, batch = loaded(name, "float32"), a_batch(name)
    with torch.no_grad():
        losses = {"base": float(base.eval()(**batch).loss)}
        for settings in EXACT:
            model = loaded(name, "float32")
            chosen = techniques.build_techniques([Unit(name="meft", settings=settings)])
            techniques.apply_techniques(chosen, model, task_of(name), 0)
            losses[settings["variant"]] = float(model.eval()(**batch).loss)
    return {"model": name, "start_loss": losses}


if __name__ == "__main__":
    main()
