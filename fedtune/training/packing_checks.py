"""Can the texts of a packed row be kept apart? A model that mixes them is refused before training."""

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.tasks import get_task

__all__ = ["check_packing"]

_BROKEN = (IndexError, RuntimeError, TypeError, ValueError)
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_COARSE_TOLERANCE = 0.05
"""For weights of half precision, whose products round differently in rows of another length."""
_LENGTHS = (5, 4)


def check_packing(recipe: Recipe, model: nn.Module) -> None:
    """RecipeError for a task without packing, ModelError for a model whose texts see each other in a packed row."""
    if recipe.train.packing == "none":
        return
    if not get_task(recipe.task).can_pack:
        raise RecipeError(f"train.packing: {recipe.task.name} is not trained on packed texts; drop packing")
    if not _keeps_texts_apart(model):
        raise ModelError(
            f"{recipe.model.source}: {type(model).__name__} does not keep the texts of a packed row apart, as it does "
            "not restart with position_ids; set train.packing to none"
        )


@torch.no_grad()
def _keeps_texts_apart(model: nn.Module) -> bool:
    """Whether a text is computed alike behind different texts, and as it is when alone.

    The first is compared in training mode, where a technique may replace the forward pass. The second is not asked of a
    quantised base, which the first step in evaluation mode would rearrange.
    """
    mode = model.training
    try:
        one, other = (_run_behind(model.train(), token) for token in (1, 2))
        apart = _are_close(one, other, 1e-6)
        if not apart or getattr(model, "is_quantized", False):
            return apart
        text = torch.arange(1, _LENGTHS[1] + 1)[None]
        alone = model.eval()(input_ids=text, attention_mask=torch.ones_like(text)).logits
        return _are_close(_run_behind(model, 1), alone, _TOLERANCE.get(alone.dtype, _COARSE_TOLERANCE))
    except _BROKEN:
        return False
    finally:
        model.train(mode)


def _run_behind(model: nn.Module, token: int) -> Tensor:
    """Logits of a text behind another one that repeats a token; dropout is the same in each call."""
    first, second = _LENGTHS
    text = torch.arange(1, second + 1)[None]
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.cat([torch.full((1, first), token), text], 1)
        logits: Tensor = model(input_ids=ids, position_ids=positions).logits
    return logits[:, first:].float()


def _are_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())
