"""Updates weights during the backward pass: each gradient is used and freed as soon as it is complete.

Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO, arXiv 2306.09782),
algorithm 1: plain SGD, fused with the backward pass. A weight is changed only after all operations that need its old
value have run, so the result has the bits of SGD after the backward pass. Not taken over: the two passes that clip
gradients.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.nn import Parameter

from fedtune.errors import MemoryBudgetError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.techniques import Technique
from fedtune.training.optimisers import LocalOptimiser

__all__ = ["check_backward_updates", "refuse_smaller_batch", "update_in_backward"]


def check_backward_updates(recipe: Recipe, chosen: Sequence[Technique]) -> None:
    """Raise RecipeError if something of a recipe with lomo changes the gradients of a whole step."""
    if recipe.train.optimiser != "lomo":
        return
    changing = [one for one in chosen if type(one).before_optimiser_step is not Technique.before_optimiser_step]
    if changing or recipe.stream is not None:
        what = changing[0].name if changing else "a stream"
        raise RecipeError(
            f"train.optimiser: lomo updates weights during the backward pass, and {what} may change gradients after "
            "it; take sgd"
        )


def refuse_smaller_batch(recipe: Recipe, size: int | None) -> None:
    """Raise MemoryBudgetError if a batch would pass in parts: after the first one the weights would have moved."""
    if recipe.train.optimiser == "lomo" and size is not None and size < recipe.train.batch_size:
        raise MemoryBudgetError(
            "train.optimiser: lomo moves weights during the backward pass, so a batch must pass at once; lower "
            f"train.batch_size to {size}, or take sgd",
            code="memory-short",
        )


@contextmanager
def update_in_backward(
    optimiser: LocalOptimiser, parameters: Sequence[Parameter], lr: float, *, active: bool
) -> Iterator[None]:
    """Take the optimiser's step for each parameter in the block when its gradient is complete, and free the gradient.

    No other parameter has a gradient then, so the optimiser changes that parameter alone.
    """

    def update(parameter: Parameter) -> None:
        optimiser.step(lr)
        parameter.grad = None

    hooks = [one.register_post_accumulate_grad_hook(update) for one in parameters] if active else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
