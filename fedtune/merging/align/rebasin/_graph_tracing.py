"""Find the permutations of a network by tracing it: perceptrons and convolutional networks, plain or residual.

torch.fx traces the network without an input. The type of a layer says how channels pass through it; an unknown layer or
function is named in the error. Each layer with new output channels begins a permutation. Tensors that are added or
multiplied share one permutation. Channels of the input and output of the network cannot be permuted.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from fedtune.merging.align.rebasin._layer_rules import apply_layer_rule
from fedtune.merging.align.rebasin._permutations import PermutationSpec
from fedtune.merging.align.rebasin._spec_builder import PermutationSpecBuilder, TracedChannels, make_unsupported_error

__all__ = ["trace_permutation_spec"]


def trace_permutation_spec(model: nn.Module) -> PermutationSpec:
    """Raises ModelError, naming the first layer, function or tensor, when the net holds something that is not known."""
    reading = PermutationSpecBuilder(model)
    wires: dict[fx.Node, TracedChannels] = {}
    for node in _traced(model).nodes:
        wire = _trace_node(reading, node, [wires[one] for one in node.all_input_nodes if one in wires])
        if wire is not None:
            wires[node] = wire
    missing = [name for name in model.state_dict() if name not in reading.axes]
    if missing:
        raise make_unsupported_error(repr(missing[0]), "belongs to no layer that rebasin knows")
    return reading.build_spec()


class _Tracer(fx.Tracer):
    """Goes into modules that have children, bundles made during the forward pass too, and records the others."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if any(True for _ in m.children()):
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _traced(model: nn.Module) -> fx.Graph:
    """The graph of a model inside a bundle, so that its optional inputs keep their defaults."""
    try:
        return _Tracer().trace(nn.Sequential(model))
    except Exception as error:  # a forward pass may do anything with what stands for its input
        raise make_unsupported_error(type(model).__name__, f"cannot be traced ({error})") from error


def _trace_node(reading: PermutationSpecBuilder, node: fx.Node, inputs: list[TracedChannels]) -> TracedChannels | None:
    if node.op == "placeholder":
        return TracedChannels()
    if node.op == "output" or _bundles(node):
        for wire in inputs:
            reading.join_permutations(TracedChannels(), wire, "the output")
        return None
    if node.op == "call_module":
        where = str(node.target).removeprefix("0.")
        return apply_layer_rule(reading, where, reading.model.get_submodule(where), inputs[0])
    return _function(reading, node, inputs)


def _bundles(node: fx.Node) -> bool:
    """Whether a named tuple of outputs is made."""
    return isinstance(node.target, type) and issubclass(node.target, tuple)


_PER_CHANNEL = frozenset(
    {
        *("relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "hardsigmoid", "tanh", "sigmoid"),
        *("softplus", "dropout", "contiguous", "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    }
)
_JOINS: Mapping[Any, str] = {operator.add: "add", operator.iadd: "add", operator.mul: "mul", operator.imul: "mul"}
_SHAPES = ("size", "getitem", "getattr")
_HEIGHT_AND_WIDTH = ("(2, 3)", "(-2, -1)", "(-1, -2)")


def _function(reading: PermutationSpecBuilder, node: fx.Node, inputs: list[TracedChannels]) -> TracedChannels | None:
    """After a function of torch or a method of tensors."""
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    name = _JOINS.get(node.target, called)
    if name in _SHAPES:
        return None
    if inputs and name in ("add", "mul"):
        return reading.join_permutations(inputs[0], inputs[-1], f"a function {name}")
    if inputs and name in _PER_CHANNEL:
        return inputs[0]
    if inputs and (_flattens(node, name) or _averages(node, name)):
        return inputs[0]._replace(is_spatial=bool(node.kwargs.get("keepdim")))
    raise make_unsupported_error(f"the net calls or reads {name!r},", "which rebasin does not know")


def _read_first_argument(node: fx.Node, key: str) -> str:
    """The first argument beside the tensor, by place or by name."""
    found = node.args[1] if len(node.args) > 1 else node.kwargs.get(key)
    return str(found).replace("[", "(").replace("]", ")")


def _flattens(node: fx.Node, name: str) -> bool:
    """From the channels to the end."""
    folds = name in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1
    return bool(folds) or (name == "flatten" and _read_first_argument(node, "start_dim") == "1" and len(node.args) < 3)


def _averages(node: fx.Node, name: str) -> bool:
    return name == "mean" and _read_first_argument(node, "dim") in _HEIGHT_AND_WIDTH
