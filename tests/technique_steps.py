"""What the tests of the techniques share: applying them to a model, moving what they train, taking a step."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedtune import techniques
from fedtune.memory import StorageMeter
from fedtune.recipe.schema import Unit
from fedtune.tasks import Task, get_task
from fedtune.techniques import Technique

__all__ = ["IMAGES", "LANGUAGE", "TEXT", "chosen", "gradients", "layers", "logits", "shake", "shared"]

TEXT = get_task("text-classification")
LANGUAGE = get_task("text-generation")
IMAGES = get_task("image-classification")


def chosen(joined: str, **settings: Any) -> tuple[Technique, ...]:
    """Techniques joined by ``+``; the settings are those of the first."""
    first, *others = joined.split("+")
    return techniques.build_techniques([Unit(name=first, settings=settings), *(Unit(name=name) for name in others)])


def shared(joined: str, model: nn.Module, task: Task, seed: int = 0, **settings: Any) -> list[str]:
    return techniques.apply_techniques(chosen(joined, **settings), model, task, seed)


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(**batch).logits
    return out


def shake(model: nn.Module, names: list[str], seed: int = 5) -> None:
    """Move what is trained, as a few rounds would."""
    random = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    for name in names:
        if name not in parameters:
            continue  # a mask is no matter of degree
        parameters[name].data += 0.1 * torch.randn(parameters[name].shape, generator=random)


def layers(model: nn.Module, kind: type[nn.Module]) -> Iterator[str]:
    return (name for name, layer in model.named_modules() if isinstance(layer, kind))


def gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step in training mode, and the bytes kept for it."""
    model.train()
    torch.manual_seed(3)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss: Tensor = model(**batch).loss
        kept = meter.current_bytes
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept
