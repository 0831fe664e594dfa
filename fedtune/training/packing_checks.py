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
    """Whether a text behind another one has the logits that it has alone, whatever the text before it says."""
    training = model.training
    try:
        model.eval()
        alone, one, other = _probe(model)
    except _BROKEN:
        return False
    finally:
        model.train(training)
    largest = _TOLERANCE.get(next(model.parameters()).dtype, _COARSE_TOLERANCE) * float(alone.abs().max())
    return bool((one - other).abs().max() <= largest) and bool((one - alone).abs().max() <= largest)


def _probe(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a text alone, and behind two different texts."""
    first, second = _LENGTHS
    text = torch.arange(1, second + 1)[None]
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
    alone = model(input_ids=text, attention_mask=torch.ones_like(text)).logits
    behind = [
        model(input_ids=torch.cat([torch.full((1, first), token), text], 1), position_ids=positions).logits[:, first:]
        for token in (1, 2)
    ]
    return alone, behind[0], behind[1]
