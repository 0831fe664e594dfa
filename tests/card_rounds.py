"""Trains each technique for a round on the CPU and on the pretended card, in a process of its own.

``python -m tests.card_rounds`` prints a JSON object by data type and case, and with the cases of ``tests.card_uses``.
It is a process of its own because torch cannot forget a backend that was registered.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtune import techniques
from fedtune.library.tiny_models import TINY_MODELS, TinyModel
from fedtune.recipe.schema import Recipe, TaskUnit, Unit
from fedtune.tasks import get_task
from fedtune.training import ClientRound, LocalTrainingResult, get_model_state, train_local_model
from tests.card_uses import run_uses, try_case
from tests.pretend_card import CARD, CardTensor, use_card
from tests.tiny import a_training_recipe

__all__ = ["CASES", "UNDER_AUTOCAST"]

CASES = {
    "activation-pruning+lora": "a BERT classifier",
    "batch-norm": "a ResNet",
    "batch-norm-statistics+lora": "a ResNet",
    "bias": "a BERT classifier",
    "chunked-mlp+lora": "a Llama",
    "compact": "a Llama",
    "deft+lora": "a Llama",
    "dynamic-pruning": "a ResNet",
    "dynamic-pruning+activation-pruning": "a ResNet",
    "error-norm-truncation+lora": "a Llama",
    "full": "a Llama",
    "fused-cross-entropy+lora": "a Llama",
    "gradient-checkpointing+lora": "a Llama",
    "head-only": "a BERT classifier",
    "last-blocks": "a MobileNetV2",
    "int8-activations+lora": "a BERT classifier",
    "lora": "a BERT classifier",
    "meft": "a Llama",
    "mobiletl": "a MobileNetV2",
    "selective-checkpointing+lora": "a Llama",
    "shifted-attention+lora": "a Llama",
    "tinytl": "a MobileNetV2",
}
"""Techniques, and the model that they are tried on."""

UNDER_AUTOCAST = ("dynamic-pruning+activation-pruning", "fused-cross-entropy+lora", "meft", "mobiletl")
"""Techniques with backward passes of their own, which must meet the types that autocast made."""

_SETTINGS: dict[str, dict[str, Any]] = {"dynamic-pruning": {"density": 0.5, "update_every": 1}}


class _Rows:
    """Eight examples of a tiny model."""

    domains = lengths = None

    def __init__(self, tiny: TinyModel, dtype: torch.dtype) -> None:
        parts = [tiny.make_batch(seed) for seed in (1, 5)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self.tensors = {name: one.to(dtype) if one.is_floating_point() else one for name, one in joined.items()}

    def __len__(self) -> int:
        return 8

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return {name: tensor[torch.as_tensor(list(indices))] for name, tensor in self.tensors.items()}


def _build_without_dropout(tiny: TinyModel) -> nn.Module:
    """Dropout inside a model is drawn by the device itself."""
    model = tiny.build(0)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


def _train(case: str, dtype: torch.dtype, waits: Counter[str] | None, steps: int = 2) -> LocalTrainingResult:
    """A round with held-out examples; on the card if its ``waits`` are given, which then count those of the round."""
    tiny = next(one for one in TINY_MODELS if one.name == CASES[case])
    units = [Unit(name=name, settings=_SETTINGS.get(name, {})) for name in case.split("+")]
    model, chosen = _build_without_dropout(tiny).to(dtype), techniques.build_techniques(units)
    shared = techniques.apply_techniques(chosen, model, get_task(TaskUnit(name=tiny.task)), 7)
    state = get_model_state(model, shared)
    local = get_model_state(model, techniques.list_local_tensors(model))
    if waits is not None:
        model.to(CARD)
        assert all(one.device == CARD for one in (*model.parameters(), *model.buffers()))
        waits.clear()
    recipe = _make_recipe(tiny, steps)
    return train_local_model(ClientRound(model, chosen, recipe, _Rows(tiny, dtype), np.arange(8), 1, 1, local), state)


def _make_recipe(tiny: TinyModel, steps: int) -> Recipe:
    recipe = a_training_recipe(rounds=3, optimiser="sgd", lr=0.1, batch_size=3, local_steps=steps)
    evaluation = recipe.evaluation.model_copy(update={"local_holdout": 0.25})
    return recipe.model_copy(update={"task": TaskUnit(name=tiny.task), "evaluation": evaluation})


def _compare(case: str, dtype: torch.dtype) -> dict[str, Any]:
    wanted = _train(case, dtype, None)
    with use_card(pytest.MonkeyPatch()) as card:
        found = _train(case, dtype, card.waits)
        waits = Counter(card.waits)
        _train(case, dtype, card.waits, 3)
    per_step = Counter(card.waits)
    per_step.subtract(waits)
    sent = {**found.delta, **found.extra_payload, **found.local_tensors}
    strangers = [name for name, one in sent.items() if isinstance(one, CardTensor) or one.device.type != "cpu"]
    return {
        "error": _difference(found.delta, wanted.delta),
        "losses": [wanted.train_loss, found.train_loss],
        "scores": [wanted.trained_score.loss, found.trained_score.loss],
        "device_type": found.device_type,
        "not_on_cpu": strangers,
        "extra": [sorted(wanted.extra_payload) == sorted(found.extra_payload), len(found.extra_payload)],
        "waits_per_step": {name: count for name, count in per_step.items() if count},
    }


def _difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The norm of the difference of all tensors, relative to that of the delta; some have no gradient but rounding."""
    gaps = [float((found[name].double() - one.double()).square().sum()) for name, one in wanted.items()]
    return math.sqrt(sum(gaps) / sum(float(one.double().square().sum()) for one in wanted.values()))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    kinds = {"float32": (torch.float32, tuple(CASES)), "bfloat16": (torch.bfloat16, UNDER_AUTOCAST)}
    rounds = {name: {case: try_case(_compare, case, kind) for case in cases} for name, (kind, cases) in kinds.items()}
    print(json.dumps({**rounds, "uses": run_uses()}))
