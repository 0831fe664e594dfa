"""What a PyTorch user would write by hand: model, optimiser, a loop. The yardstick for quality and for overhead."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fedtune.training import Workshop

__all__ = ["bare_loop"]


def bare_loop(shop: Workshop, indices: Sequence[int], steps: int, seed: int, learn_to: float = 0.0) -> float:
    """Train everything the recipe shares for so many steps on the given examples; returns the mean loss.

    The learning rate falls linearly to the share ``learn_to`` of its start. Unlike a federation's client, the loop
    trains both factors of a low-rank pair in every step, as anybody would who trains in one place.
    """
    settings = shop.recipe.train
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    parameters = dict(shop.model.named_parameters())
    trained = [parameters[name].requires_grad_(True) for name in shop.shared]
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    shop.model.train()
    order: list[int] = []
    total = 0.0
    for step in range(steps):
        if len(order) < settings.batch:
            order += random.permutation(np.asarray(indices)).tolist()
        chosen, order = order[: settings.batch], order[settings.batch :]
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * (1 - (1 - learn_to) * step / steps)
        loss = shop.model(**shop.train.batch(chosen)).loss
        loss.backward()
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(trained, settings.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        total += float(loss.detach())
    return total / steps
