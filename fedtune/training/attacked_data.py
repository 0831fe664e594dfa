"""The examples that an attacker of a simulation trains on."""

import copy
from dataclasses import replace
from typing import Any

from fedtune.attacks import build_attack
from fedtune.errors import RecipeError
from fedtune.training.run_context import RunContext

__all__ = ["change_training_data"]


def change_training_data(context: RunContext, client: int) -> RunContext:
    """Return the run context whose training examples have the labels that a client's attack gives them.

    For honest clients, and attacks that change no labels, it is the context itself.
    """
    device = context.recipe.get_device_class(client)
    attack = build_attack(device)
    if attack is None or not attack.changes_labels:
        return context
    examples: Any = context.train
    labels = getattr(examples, "labels", None)
    if labels is None or labels.is_floating_point() or labels.dim() != 1:
        raise RecipeError(
            f"devices: {device.name}: {attack.name} changes classes, but these examples have no single class; choose "
            "sign-flip"
        )
    changed = copy.copy(context)
    vars(changed)["train"] = replace(examples, labels=attack.change_labels(labels, len(context.corpus.label_names)))
    return changed
