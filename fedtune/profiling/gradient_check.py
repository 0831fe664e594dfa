"""Compare a technique's gradients with those of the same network with stored activations."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, fork_random_state, move_tensors
from fedtune.errors import ModelError
from fedtune.recipe.schema import Recipe, Unit
from fedtune.seeds import derive_seed
from fedtune.tasks import get_task
from fedtune.techniques import Technique, begin_round, begin_step, list_trainable_tensors
from fedtune.training import compute_step_loss, prepare_model, set_model_state, set_train_mode

__all__ = ["gradient_error"]

Tensors = Mapping[str, Tensor]
_ROUNDING = 2.0**-20


def gradient_error(
    recipe: Recipe, labels: Sequence[str], state: Tensors, batch: Tensors, rounds: Sequence[int]
) -> float:
    """Return the largest relative difference of any parameter's gradient: max|a - b| / max|b|; 0 if bit-identical.

    ``a`` is the recipe's gradient and ``b`` that of the reference, from the same ``state`` and the same random numbers.
    """
    model, chosen, _ = prepare_model(recipe, labels)
    twin, twins, _ = prepare_model(_make_reference_recipe(recipe, chosen), labels)
    for one in (model, twin):
        set_model_state(one, state)
    return max(
        _difference(
            _gradients(recipe, model, chosen, batch, round_number), _gradients(recipe, twin, twins, batch, round_number)
        )
        for round_number in rounds
    )


def _make_reference_recipe(recipe: Recipe, chosen: Sequence[Technique]) -> Recipe:
    """Return the recipe with the techniques that store all activations."""
    twins = [twin for technique in chosen if (twin := technique.make_reference()) is not None]
    units = [Unit(name=twin.name, settings=twin.model_dump(mode="json")) for twin in twins]
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"techniques": units})})


def _gradients(
    recipe: Recipe, model: nn.Module, techniques: Sequence[Technique], batch: Tensors, round_number: int
) -> dict[str, Tensor]:
    """Return the gradients of the trained parameters; zeros for a parameter without a gradient."""
    begin_round(techniques, model, round_number)
    set_train_mode(model)
    model.zero_grad()
    device = find_device(model)
    with fork_random_state(device):
        torch.manual_seed(derive_seed(recipe.seed, "profile"))
        batch = move_tensors(batch, device)
        begin_step(techniques, model, batch, 0.0)
        compute_step_loss(get_task(recipe.task), model, batch).backward()
    names = set(list_trainable_tensors(model))
    found = {name: parameter for name, parameter in model.named_parameters() if name in names}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in found.items()}


def _difference(found: Tensors, wanted: Tensors) -> float:
    if found.keys() != wanted.keys():
        odd = min(found.keys() ^ wanted.keys())
        raise ModelError(
            f"{odd} is trained either by the technique or by the reference with stored activations, but not by both"
        )
    scale = max(_largest(tensor) for tensor in wanted.values())
    return max(_relative(name, found[name], wanted[name], scale) for name in wanted)


def _relative(name: str, found: Tensor, wanted: Tensor, scale: float) -> float:
    """Return the difference relative to the gradient's largest entry, but at least to the rounding of ``scale``.

    A bias that a softmax cancels has a gradient that is only rounding error.
    """
    if torch.equal(found, wanted):
        return 0.0
    if not (bool(found.isfinite().all()) and bool(wanted.isfinite().all())):
        raise ModelError(f"the gradient of {name} is not finite; lower train.lr")
    return _largest(found.double() - wanted.double()) / (max(_largest(wanted), _ROUNDING * scale) or 1.0)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
