"""A rewritten model is not saved by accident: what ``save_pretrained`` would write loads as another function."""

from functools import partial
from typing import Any

from torch import nn

from fedtune.errors import ModelError

__all__ = ["allow_saving", "refuse_saving"]

_UNFOLDED = "unfolded"


def refuse_saving(model: nn.Module, names: list[str]) -> None:
    """Have ``model.save_pretrained`` refuse until the techniques with these names are folded."""
    if names and hasattr(type(model), "save_pretrained"):
        vars(model)[_UNFOLDED] = list(names)
        vars(model)["save_pretrained"] = partial(_refuse, vars(model)[_UNFOLDED])


def allow_saving(model: nn.Module, name: str) -> None:
    """A technique is folded; after the last one the model saves itself as it always did."""
    unfolded: list[str] = vars(model).get(_UNFOLDED, [])
    if name in unfolded:
        unfolded.remove(name)
    if not unfolded and vars(model).pop(_UNFOLDED, None) is not None:
        del vars(model)["save_pretrained"]


def _refuse(unfolded: list[str], *_: Any, **__: Any) -> None:
    raise ModelError(
        f"this model holds {' and '.join(unfolded)} unfolded, which its configuration cannot say; write it into plain "
        "layers first: techniques.fold(chosen, model)"
    )
