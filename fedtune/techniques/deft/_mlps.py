"""Find the MLP of each transformer block by structure: an activation between a widening and a narrowing layer.

Plain: ``second(f(first(x)))``. Gated: ``second(f(gate(x)) * up(x))``, with two widening layers of equal shape.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from fedtune.errors import ModelError
from fedtune.loaded_classes import is_loaded_instance
from fedtune.models.blocks.activations import ACTIVATIONS
from fedtune.models.blocks.block_model import BlockModel
from fedtune.techniques.low_rank._paired_linear import is_pair_layer

__all__ = ["MlpLayers", "find_mlps"]


@dataclass(frozen=True)
class MlpLayers:
    """Names of an MLP's parts. ``scope`` is the smallest module that holds them all; ``stack`` the list of blocks."""

    block_list: str
    parent: str
    activation: str
    up_projections: tuple[str, ...]
    down_projection: str

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate."""
        return len(self.up_projections) == 2


def find_mlps(model: nn.Module) -> list[MlpLayers]:
    """The MLPs of all blocks in the model's order; ModelError names the first block without one."""
    found = [mlp for stack in _stacks(model) for mlp in _in_stack(model, stack)]
    if not found:
        raise ModelError(f"{type(model).__name__} has no transformer blocks whose MLPs deft could follow; leave it out")
    return found


def _stacks(model: nn.Module) -> Iterator[str]:
    """Names of the outermost lists of modules with an activation function in them."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in lists:
        nested = any(name.startswith(f"{other}.") for other in lists)
        modules = model.get_submodule(name).modules()
        if not nested and any(isinstance(module, _activations(model)) for module in modules):
            yield name


def _in_stack(model: nn.Module, stack: str) -> Iterator[MlpLayers]:
    for index, block in model.get_submodule(stack).named_children():
        name = f"{stack}.{index}"
        kinds = _activations(model)
        active = [f"{name}.{inner}" for inner, module in block.named_modules() if isinstance(module, kinds)]
        mlps = [mlp for activation in active if (mlp := _find_mlp_around(model, stack, name, activation)) is not None]
        if not mlps:
            raise ModelError(
                f"{name} ({type(block).__name__}) has no activation between one or two widening linear layers and a "
                "narrowing one, which deft follows; leave deft out for this model"
            )
        yield from mlps


def _find_mlp_around(model: nn.Module, stack: str, block: str, activation: str) -> MlpLayers | None:
    """The MLP of an activation; None for the activation of an adapter, whose layers narrow first."""
    scope = activation
    while scope != block:
        scope = scope.rpartition(".")[0]
        widening, narrowing = _match_projections(_list_linear_layers(model, scope))
        if len(widening) == 1 and len(widening[0]) <= 3:
            *firsts, second = widening[0]
            return MlpLayers(stack, scope, activation, tuple(firsts), second)
        if widening or narrowing:
            return None
    return None


def _match_projections(layers: Iterator[tuple[str, tuple[int, int]]]) -> tuple[list[list[str]], list[list[str]]]:
    """Layers with the one defined next that undoes their change of width: first those that widen, then the others."""
    found: tuple[list[list[str]], list[list[str]]] = [], []
    waiting: dict[tuple[int, int], list[str]] = {}
    for name, (inner, outer) in layers:
        if inner != outer and (firsts := waiting.pop((outer, inner), None)):
            found[outer > inner].append([*firsts, name])
        else:
            waiting.setdefault((inner, outer), []).append(name)
    return found


def _list_linear_layers(model: nn.Module, scope: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and (in, out) of the linear layers below ``scope``, those with an adapter counted once."""
    whole = ""
    module: Any
    for inner, module in model.get_submodule(scope).named_modules(prefix=scope):
        if whole and inner.startswith(f"{whole}."):
            continue
        if isinstance(module, nn.Linear) or is_pair_layer(module):
            whole = inner
            yield inner, (int(module.in_features), int(module.out_features))
        elif is_loaded_instance(module, "transformers.pytorch_utils", "Conv1D"):
            yield inner, (int(module.weight.shape[0]), int(module.weight.shape[1]))


def _activations(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The classes of activation functions in a model."""
    return _list_plain_activations() if isinstance(model, BlockModel) else _list_transformers_activations()


@cache
def _list_plain_activations() -> tuple[type[nn.Module], ...]:
    return tuple({type(make()) for make in ACTIVATIONS.values()})


@cache
def _list_transformers_activations() -> tuple[type[nn.Module], ...]:
    from transformers.activations import ACT2CLS  # loaded, or about to be

    classes: list[Any] = [made[0] if isinstance(made, tuple) else made for made in ACT2CLS.values()]
    return tuple(classes)
