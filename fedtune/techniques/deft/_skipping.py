"""Lets transformers load an exported model without some of its MLPs, which are neither saved nor computed.

No configuration of transformers can describe that, so the exported folder contains this file.
``AutoModel....from_pretrained(folder, trust_remote_code=True)`` builds its classes; without that flag, transformers
refuses to load them. The file needs only torch and transformers.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["ZeroOutput", "remove_mlps", "remove_mlps_for_export"]

_PREFIX = "Skipping"


class ZeroOutput(nn.Module):
    """Replaces the last layer of an MLP, so that the block adds zero to its residual stream."""

    weight = None

    def forward(self, x: Tensor) -> Tensor:
        """Zeros like x."""
        return torch.zeros_like(x)


def remove_mlps(model: Any, skipped: Sequence[Sequence[str]]) -> None:
    """Drop MLPs, each given by the names of its linear layers in order."""
    for *firsts, second in skipped:
        for first in firsts:
            model.set_submodule(first, nn.Identity())
        model.set_submodule(second, ZeroOutput())


def remove_mlps_for_export(model: Any, auto_class: str, skipped: Sequence[Sequence[str]]) -> None:
    """Drop MLPs of a transformers model and let it save itself with this file."""
    remove_mlps(model, skipped)
    model.config.__class__ = _class(_PREFIX + type(model.config).__name__)
    model.config.skipped_mlps = [list(names) for names in skipped]
    model.__class__ = _class(_PREFIX + type(model).__name__)
    model._weight_conversions = []  # the weights go under the names they have here: a new type has no older ones
    type(model.config).register_for_auto_class()
    type(model).register_for_auto_class(auto_class)


@cache
def _class(name: str) -> type[Any]:
    base = getattr(transformers, name.removeprefix(_PREFIX))
    if issubclass(base, transformers.PretrainedConfig):
        return type(name, (base,), {"__module__": __name__, "model_type": f"skipping-{base.model_type}"})
    settings = {
        "__module__": __name__,
        "config_class": _class(_PREFIX + base.config_class.__name__),
        "__init__": _initialiser(base),
    }
    return type(name, (base,), settings)


def _initialiser(base: type[Any]) -> Callable[..., None]:
    def initialise(self: Any, config: Any, *others: Any, **settings: Any) -> None:
        base.__init__(self, config, *others, **settings)
        remove_mlps(self, config.skipped_mlps)

    return initialise


def __getattr__(name: str) -> Any:
    """The class SkippingX, made from X of transformers."""
    if name.startswith(_PREFIX):
        return _class(name)
    raise AttributeError(name)
