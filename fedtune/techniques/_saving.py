"""Refuse to save a rewritten model: transformers would load the saved files as another function."""

from functools import partial
from typing import Any

from torch import nn

from fedtune.errors import ModelError

__all__ = ["allow_saving", "refuse_saving"]

_UNMERGED = "unmerged"


def refuse_saving(model: nn.Module, names: list[str]) -> None:
    """Let ``model.save_pretrained`` refuse until the techniques with these names are merged into the weights."""
    if names and hasattr(type(model), "save_pretrained"):
        vars(model)[_UNMERGED] = list(names)
        vars(model)["save_pretrained"] = partial(_refuse, vars(model)[_UNMERGED])


def allow_saving(model: nn.Module, name: str) -> None:
    """Note that a technique is merged into the weights; after the last one ``save_pretrained`` works again."""
    unmerged: list[str] = vars(model).get(_UNMERGED, [])
    if name in unmerged:
        unmerged.remove(name)
    if not unmerged and vars(model).pop(_UNMERGED, None) is not None:
        vars(model).pop("save_pretrained", None)


def _refuse(unmerged: list[str], *_: Any, **__: Any) -> None:
    raise ModelError(
        f"the configuration of this model cannot describe {' and '.join(unmerged)}; merge it into plain layers before "
        "saving: save(folder) or merge() of a prepared model, techniques.merge_into_weights(chosen, model) elsewhere"
    )
