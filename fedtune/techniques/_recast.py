"""A layer made over as another class around the same parameters and buffers, put in its place and taken out again."""

from collections.abc import Callable
from copy import copy
from typing import TypeVar

from torch import Tensor, nn

from fedtune.techniques._live_norm import UnfrozenBatchNorm2d

__all__ = ["ForwardOverride", "ReplacementLayer", "convert_layer_class", "replace_layer", "restore_plain_layers"]

_Kind = TypeVar("_Kind", bound=nn.Module)


class ReplacementLayer(nn.Module):
    """Mixed into a layer that took a plain one's place under its name."""

    def to_plain_layer(self) -> nn.Module:
        """The plain layer again, around the same parameters and buffers."""
        raise NotImplementedError


class ForwardOverride:
    """What is called in place of a module's own ``forward``: an object, so that the module still pickles."""

    def __call__(self, x: Tensor) -> Tensor:
        """What the module gives."""
        raise NotImplementedError

    def install(self, module: nn.Module) -> None:
        """Take the place."""
        vars(module)["forward"] = self


def convert_layer_class(layer: nn.Module, kind: type[_Kind]) -> _Kind:
    """What ``layer`` holds as a module of another class, which needs no attributes but those."""
    made = kind.__new__(kind)
    vars(made).update({name: copy(held) if isinstance(held, dict) else held for name, held in vars(layer).items()})
    return made


def replace_layer(model: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    """Put what ``make`` gives for the named layer in its place, in the same mode."""
    layer = model.get_submodule(name)
    made = make(layer)
    if made is not layer:
        model.set_submodule(name, made.train(layer.training))


def restore_plain_layers(model: nn.Module) -> None:
    """Put plain layers back wherever one was replaced, and modules' own functions."""
    for name, layer in list(model.named_modules()):
        if isinstance(vars(layer).get("forward"), ForwardOverride):
            del vars(layer)["forward"]
        if isinstance(layer, ReplacementLayer | UnfrozenBatchNorm2d):
            model.set_submodule(name, layer.to_plain_layer().train(layer.training))
