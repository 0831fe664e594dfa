"""Check that the memory of device classes can be enforced in a simulation, and compare it with what clients held."""

from collections.abc import Sequence

from fedtune.device.held_memory import count_held_bytes
from fedtune.errors import RecipeError
from fedtune.memory.limits import can_limit_memory
from fedtune.plan.runtime_surplus import measure_runtime_surplus
from fedtune.plan.runtimes import TRAINER_MODULES
from fedtune.recipe.device_class import DeviceClass
from fedtune.recipe.schema import Recipe
from fedtune.simulation.compute_devices import uses_accelerator
from fedtune.tracking import ClientRecord, RoundRecord

__all__ = ["describe_memory_excesses", "require_enforceable"]


def require_enforceable(recipe: Recipe, engine: str) -> None:
    """Raise RecipeError if the memory of the clients cannot be limited here."""
    if engine == "flower":
        raise RecipeError("--enforce-memory: Flower's engine runs clients in Ray's processes; use --engine in-process")
    if uses_accelerator(recipe):
        raise RecipeError("--enforce-memory limits processes, not an accelerator's memory; set train.device to cpu")
    if not can_limit_memory():
        raise RecipeError(
            "--enforce-memory: this system does not limit the private memory of a process; run it on Linux, or leave "
            "it out: an excess is then a warning at the end"
        )


def describe_memory_excesses(recipe: Recipe, rounds: Sequence[RoundRecord]) -> list[str]:
    """Return a sentence for each device class of which a client held more memory than the recipe gives it."""
    every = [one for record in rounds for one in record.client_records]
    found = []
    for device_class in recipe.devices:
        held = max((_count(one) for one in every if one.device_class == device_class.name), default=0)
        if held > device_class.memory and held > device_class.memory + _measure_surplus(recipe, device_class):
            found.append(
                f"a client of device class {device_class.name} held {held / 1e6:,.0f} MB, and the recipe gives it "
                f"{device_class.memory / 1e6:,.0f} MB; raise its memory, use a technique that keeps less (see fedtune "
                "profile), or see what a device would do with --enforce-memory"
            )
    return found


def _measure_surplus(recipe: Recipe, device_class: DeviceClass) -> int:
    return measure_runtime_surplus(recipe.apply_device_class(device_class), TRAINER_MODULES)


def _count(record: ClientRecord) -> int:
    if record.anonymous_memory is None:
        return record.peak_memory
    return count_held_bytes(record.anonymous_memory, record.file_memory or 0)
