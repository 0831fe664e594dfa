"""Select the eligible clients of a run and the cohort of a round, from the recipe and the committed rounds only."""

import json
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np

from fedtune.errors import RecipeError
from fedtune.recipe.federation import ClientSelection
from fedtune.recipe.round_schedule import list_cohort_sizes
from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.tracking import DeviceRecord

__all__ = [
    "check_base_for_devices",
    "check_enough_eligible_clients",
    "check_enough_enrolled_devices",
    "count_cohort",
    "is_device_eligible",
    "list_eligible_clients",
    "prefer_clients",
    "rank_clients",
    "sample_cohort",
]


def is_eligible(select: ClientSelection, name: str, tags: Collection[str], memory: int) -> bool:
    """Whether a device with this name, these tags and this memory in bytes may take part."""
    named = not select.device_names or any(fnmatchcase(name, pattern) for pattern in select.device_names)
    return named and set(select.tags) <= set(tags) and memory >= select.min_memory


def is_device_eligible(select: ClientSelection, device: DeviceRecord) -> bool:
    """Whether an enrolled device meets the selection criteria and is not quarantined.

    Operators set the tags. The device itself reports only its memory, which counts as 0 until it joins.
    """
    if device.quarantine_reason:
        return False
    told = json.loads(device.profile).get("memory")
    return is_eligible(select, device.name, device.tags, told if isinstance(told, int) else 0)


def list_eligible_clients(recipe: Recipe) -> list[int]:
    """Return the clients of a simulation whose device class may take part, in order."""
    classes = enumerate(recipe.get_device_class(client) for client in range(recipe.num_clients))
    select = recipe.federation.selection
    return [client for client, one in classes if is_eligible(select, one.name, one.tags, one.memory)]


def count_cohort(recipe: Recipe, among: Sequence[int]) -> int:
    """Return the number of the clients ``among`` that a round selects."""
    return recipe.federation.clients_per_round or max(1, round(len(among) * recipe.federation.fraction_train))


def check_enough_eligible_clients(recipe: Recipe) -> None:
    """Raise RecipeError if too few clients of a simulation qualify for its rounds."""
    among, federation = list_eligible_clients(recipe), recipe.federation
    needed = max(
        federation.clients_per_round or 1,
        *list_cohort_sizes(recipe)[1:],
        federation.quorum,
        federation.asynchronous.buffer_size if federation.asynchronous else 1,
    )
    if count_cohort(recipe, among) < federation.quorum or len(among) < needed:
        raise RecipeError(
            f"federation.selection: {len(among)} of the {recipe.num_clients} clients in devices qualify, but a round "
            f"needs {needed}; relax the selection, or add the name, tags or memory to their device class"
        )


def check_base_for_devices(recipe: Recipe) -> None:
    """Raise RecipeError for a base model that devices cannot load: they have no run store."""
    if recipe.model.source.startswith("run:"):
        raise RecipeError(
            f"model.source is {recipe.model.source}, and devices have no run store; export it, put the folder on every "
            "device and name it: path:FOLDER"
        )


def check_enough_enrolled_devices(recipe: Recipe, devices: Sequence[DeviceRecord]) -> None:
    """Raise RecipeError if a recipe selects devices and too few of those that are enrolled qualify."""
    select = recipe.federation.selection
    found = sum(is_device_eligible(select, device) for device in devices)
    if select.has_criteria and found < recipe.num_clients:
        raise RecipeError(
            f"federation.selection: {found} of {len(devices)} enrolled devices qualify, but devices counts "
            f"{recipe.num_clients}; tag or enrol more, or lower the count; see fedtune server devices"
        )


def sample_cohort(
    recipe: Recipe,
    round_number: int,
    among: Sequence[int] | None = None,
    last: Mapping[int, int] = {},
    asked: int | None = None,
) -> list[int]:
    """Return the clients of a round in ascending order, sampled from ``among``, which defaults to all clients.

    ``last`` is the last round that selected each client, for ``sampling: least-recent``. ``asked`` is the number of
    clients; the default is that of the recipe.
    """
    there = range(recipe.num_clients) if among is None else among
    count = count_cohort(recipe.get_round_recipe(round_number), there) if asked is None else asked
    if recipe.federation.selection.sampling == "least-recent":
        return sorted(rank_clients(recipe, round_number, there, last)[:count])
    random = np.random.default_rng(derive_seed(recipe.seed, round_number, "sample"))
    return sorted(there[place] for place in random.choice(len(there), count, replace=False))


def prefer_clients(sampled: Sequence[int], among: Sequence[int], preferred: Collection[int]) -> list[int]:
    """Return as many clients as were ``sampled``, in ascending order: the ``preferred`` ones first, then sampled ones.

    If there are too many preferred ones, sampled ones among them come first.
    """
    asking = [client for client in among if client in preferred]
    order = [*(one for one in sampled if one in preferred), *asking, *sampled]
    return sorted(list(dict.fromkeys(order))[: len(sampled)])


def rank_clients(recipe: Recipe, round_number: int, among: Sequence[int], last: Mapping[int, int]) -> list[int]:
    """Return all clients ``among`` in the order in which a round prefers them."""
    random = np.random.default_rng(derive_seed(recipe.seed, round_number, "order"))
    drawn = [among[place] for place in random.permutation(len(among))]
    if recipe.federation.selection.sampling == "random":
        return drawn
    return sorted(drawn, key=lambda client: last.get(client, 0))  # those that were never selected first
