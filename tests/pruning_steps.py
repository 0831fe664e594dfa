"""A model with activation pruning among its techniques, and a step of it."""

from typing import Any

import torch
from torch import Tensor, nn

from fedtune import techniques
from fedtune.memory import StorageMeter
from fedtune.models.resnet import ResNet18
from fedtune.recipe.schema import Unit
from fedtune.tasks import Task
from fedtune.techniques import begin_round, begin_step
from fedtune.training import compute_step_loss, set_train_mode
from tests.technique_steps import IMAGES, shake

__all__ = ["Pruning", "a_step", "pictures", "prepared", "resnet"]

Pruning = dict[str, Any]


def prepared(model: nn.Module, task: Task, joined: str, number: int = 1, **pruning: Any) -> tuple[Any, Any]:
    """The model with techniques applied and round ``number`` begun, shaken so that no gradient is zero."""
    settings = {"activation-pruning": pruning, "lora": {"rank": 2}}
    chosen = techniques.build_techniques(
        [Unit(name=name, settings=settings.get(name, {})) for name in joined.split("+")]
    )
    shake(model, sorted(set(techniques.apply_techniques(chosen, model, task, 0)) & set(dict(model.named_parameters()))))
    begin_round(chosen, model, number)
    set_train_mode(model)
    return model, chosen


def a_step(model: Any, chosen: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Gradients, and the bytes kept for them."""
    model.zero_grad()
    begin_step(chosen, model, batch, 0.0)
    torch.manual_seed(3)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss = compute_step_loss(IMAGES, model, batch)
        kept = meter.current_bytes
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


def pictures(rows: int = 3) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(rows, 3, 32, 32, generator=random), "labels": torch.arange(rows) % 3}


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet18(3, small=True)
