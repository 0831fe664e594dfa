"""The largest number of examples that a client can train on in a round, by the recipe and its device's profile."""

import json
from collections.abc import Sequence
from typing import Any

from fedtune.data.packed_texts import count_tokens
from fedtune.recipe.schema import Recipe
from fedtune.server.reports import MOST_EXAMPLES
from fedtune.tracking import Assignment, Store
from fedtune.training import RunContext

__all__ = ["most_examples"]


def most_examples(context: RunContext, store: Store, run: str, client: int) -> int:
    """Return the largest number of examples, or of targets, that an honest report of this client can contain.

    With ``train.local_steps``, it follows from the recipe: a packed row contains at most as many texts as tokens. With
    ``train.local_epochs``, it follows from the examples of a simulated client, or from those that a device declared in
    its profile before its update. If a device has declared none, the largest number of any device of the run is used.
    With ``train.weigh_by: tokens``, tokens are declared and counted: each is one target at most.
    """
    recipe = context.recipe.get_client_recipe(client)
    if recipe.privacy is not None and recipe.privacy.noise_added_by == "clients":
        return 1
    if recipe.train.local_steps:
        each = 1 if recipe.train.packing == "none" else recipe.train.max_length  # a text has a token at least
        return min(MOST_EXAMPLES, _find_most(recipe, "local_steps") * recipe.train.batch_size * each)
    assignments, by_tokens = store.access.list_assignments(run), recipe.train.weigh_by == "tokens"
    if assignments:
        held = _declared(store, assignments, client, "tokens" if by_tokens else "examples")
    else:
        rows = context.client_rows[client]
        held = count_tokens(context.train, rows) if by_tokens else len(rows)
    return min(MOST_EXAMPLES, held * _find_most(recipe, "local_epochs"))


def _find_most(recipe: Recipe, name: str) -> int:
    """Return the largest value of a setting of the recipe in any round."""
    entries = recipe.federation.schedule or []
    return max(getattr(one, name) or 1 for one in (recipe.train, *entries))


def _declared(store: Store, assignments: Sequence[Assignment], client: int, unit: str) -> int:
    profiles = {device.name: json.loads(device.profile) for device in store.access.list_devices()}
    declared = {assignment.client: _count(profiles.get(assignment.device_name), unit) for assignment in assignments}
    return declared[client] or max(declared.values()) or MOST_EXAMPLES


def _count(profile: Any, unit: str) -> int:
    count = profile.get(unit) if isinstance(profile, dict) else None
    return count if isinstance(count, int) and 0 < count <= MOST_EXAMPLES else 0
