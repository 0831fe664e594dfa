"""Replace layers by layers of another class with the same parameters and buffers, and restore them."""

from collections.abc import Callable
from copy import copy
from typing import TypeVar

from torch import Tensor, nn

from fedtune.techniques._layers.unfrozen_batch_norm import UnfrozenBatchNorm2d

__all__ = ["ForwardOverride", "ReplacementLayer", "convert_layer_class", "replace_layer", "restore_plain_layers"]

_Kind = TypeVar("_Kind", bound=nn.Module)


class ReplacementLayer(nn.Module):
    """A layer that replaces a plain one under its name."""

    def to_plain_layer(self) -> nn.Module:
        """The plain layer, with the same parameters and buffers."""
        raise NotImplementedError


class ForwardOverride:
    """Replaces the ``forward`` of a module. It is an object, so that the module can be pickled."""

    def __call__(self, x: Tensor) -> Tensor:
        """The module's output."""
        raise NotImplementedError

    def install(self, module: nn.Module) -> None:
        """Replace the ``forward`` of a module."""
        vars(module)["forward"] = self


def convert_layer_class(layer: nn.Module, kind: type[_Kind]) -> _Kind:
    """A module of another class with the attributes of ``layer``."""
    made = kind.__new__(kind)
    vars(made).update({name: copy(held) if isinstance(held, dict) else held for name, held in vars(layer).items()})
    return made


def replace_layer(model: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    """Replace the named layer by the result of ``make``, in the same mode."""
    layer = model.get_submodule(name)
    made = make(layer)
    if made is not layer:
        model.set_submodule(name, made.train(layer.training))


def restore_plain_layers(model: nn.Module) -> None:
    """Restore all plain layers and the modules' own ``forward``."""
    for name, layer in list(model.named_modules()):
        if isinstance(vars(layer).get("forward"), ForwardOverride):
            del vars(layer)["forward"]
        if isinstance(layer, ReplacementLayer | UnfrozenBatchNorm2d):
            model.set_submodule(name, layer.to_plain_layer().train(layer.training))
