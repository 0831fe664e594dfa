"""DEFT as plainly as it can be written: activations are kept in a list, and autograd does the rest."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from fedtune import techniques
from fedtune.recipe.schema import Unit
from fedtune.tasks import Task, get_task
from fedtune.techniques import Technique
from fedtune.techniques.deft._mlps import find_mlps
from fedtune.training.step_loss import compute_step_loss
from tests.tiny import llama, texts

__all__ = [
    "activations",
    "deft",
    "folded",
    "labelled",
    "padded",
    "slow_density",
    "slow_loss",
    "step_gradients",
    "task_of",
    "unlabelled",
]


def deft(*before: str | Unit, **settings: Any) -> tuple[Technique, ...]:
    """Techniques, then deft with these settings."""
    units = [Unit(name=one) if isinstance(one, str) else one for one in before]
    return techniques.build_techniques([*units, Unit(name="deft", settings=settings)])


def padded(batch: dict[str, Tensor], *lengths: int) -> dict[str, Tensor]:
    """The batch with each text cut to its length and padded."""
    mask = (torch.arange(batch["input_ids"].shape[1]) < torch.tensor(lengths)[:, None]).long()
    return {**batch, "input_ids": batch["input_ids"] * mask, "attention_mask": mask}


@contextmanager
def activations(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the narrowing layer of each MLP reads inside the block, in order, [tokens, units]."""
    seen: list[Tensor] = []

    def take(layer: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].reshape(-1, args[0].shape[-1]))

    hooks = [model.get_submodule(mlp.down_projection).register_forward_pre_hook(take) for mlp in find_mlps(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def slow_density(seen: list[Tensor], mask: Tensor, eps: float, *, gated: bool) -> Tensor:
    """The mean over layers of the mean of s over the units of real tokens."""
    means = []
    for a in seen:
        real = a[mask.flatten().bool()]
        unit = _unit(real) if gated else 1.0
        s = (real / unit) ** 2 / ((real / unit) ** 2 + eps)
        means.append(s.mean())
    return torch.stack(means).mean()


def _unit(real: Tensor) -> float:
    magnitudes = real.detach().abs().flatten()
    return float(magnitudes.clamp(max=magnitudes.kthvalue(int(0.99 * len(magnitudes))).values).square().mean().sqrt())


def slow_loss(model: PreTrainedModel, batch: dict[str, Tensor], alpha: float, eps: float, *, gated: bool) -> Tensor:
    """Task loss + alpha D of a model without deft."""
    with activations(model) as seen:
        loss: Tensor = model(**batch).loss
    return loss + alpha * slow_density(seen, batch["attention_mask"], eps, gated=gated)


def step_gradients(
    model: nn.Module, chosen: tuple[Technique, ...], batch: dict[str, Tensor], progress: float = 1.0
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one training step, dropout drawn from a fixed seed."""
    model.train()
    model.zero_grad()
    techniques.begin_step(chosen, model, batch, progress)
    torch.manual_seed(3)
    loss = compute_step_loss(task_of(model), model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def task_of(model: nn.Module) -> Task:
    return get_task("text-classification" if "Sequence" in type(model).__name__ else "text-generation")


def labelled(model: nn.Module, rows: int = 4, length: int = 8) -> dict[str, Tensor]:
    """Texts with classes or, for a language model, themselves as labels."""
    batch = texts(llama(), rows, length)
    if task_of(model).has_classes:
        batch["labels"] = torch.randint(0, 3, (rows,), generator=torch.Generator().manual_seed(1))
    return batch


def unlabelled() -> dict[str, Tensor]:
    return {name: one for name, one in texts(llama()).items() if name != "labels"}


def folded(model: PreTrainedModel, chosen: tuple[Technique, ...], folder: Path, **settings: Any) -> PreTrainedModel:
    """Fold all techniques, save, and load with plain transformers."""
    for technique in chosen:
        technique.merge_into_weights(model)
    model.save_pretrained(folder)
    kind = AutoModelForSequenceClassification if task_of(model).has_classes else AutoModelForCausalLM
    loaded: PreTrainedModel = kind.from_pretrained(folder, **settings)
    loaded.eval()
    return loaded
