"""A partition that another package publishes, as a recipe names it: its kind and settings of its own."""

from typing import Any

from pydantic import SerializerFunctionWrapHandler, ValidatorFunctionWrapHandler, model_serializer

from fedtune.recipe.plug_ins import find_plug_ins
from fedtune.recipe.settings_model import SettingsModel

__all__ = ["PARTITIONS", "PlugInPartition", "serialise_partition", "validate_partition"]

PARTITIONS = "fedtune.partitions"
"""The group of entry points."""


class PlugInPartition(SettingsModel):
    """``partition: {kind: NAME, ...}``, where an installed package publishes NAME."""

    kind: str
    settings: dict[str, Any]

    @model_serializer
    def _to_yaml(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.settings}


def validate_partition(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Take a partition of a package as it is; anything else is a kind of fedtune's, or refused as none."""
    if isinstance(value, PlugInPartition):
        return value
    if isinstance(value, dict) and value.get("kind") in find_plug_ins(PARTITIONS):
        return PlugInPartition(kind=value["kind"], settings={key: one for key, one in value.items() if key != "kind"})
    return handler(value)


def serialise_partition(value: Any, handler: SerializerFunctionWrapHandler) -> Any:
    """Write a partition of a package as it was read."""
    return value.model_dump() if isinstance(value, PlugInPartition) else handler(value)
