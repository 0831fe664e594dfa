"""What a PyTorch user would write by hand: model, optimiser, a loop. The yardstick for quality and for overhead."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.training import RunContext
from fedtune.training.batches import batches

__all__ = ["bare_loop"]


def bare_loop(shop: RunContext, indices: NDArray[np.int64], steps: int, seed: int) -> float:
    """Train everything the recipe shares for so many steps on the given examples; returns the mean loss.

    The learning rate falls linearly to zero. Where clients alternate between the factors of a low-rank pair, the loop
    trains both in every step, as anybody would who trains in one place.
    """
    settings = shop.recipe.train
    torch.manual_seed(seed)
    parameters = dict(shop.model.named_parameters())
    trained = [parameters[name].requires_grad_(True) for name in shop.shared_names]
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    lengths = shop.train.lengths if settings.group_by_length else None
    shop.model.train()
    total = 0.0
    for step, chosen in enumerate(batches(indices, settings.batch_size, steps, seed, lengths)):
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * (1 - step / steps)
        loss = shop.model(**shop.train.make_batch(chosen)).loss
        loss.backward()
        if settings.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        total += float(loss.detach())
    return total / steps
