"""Context managers that load temporary weights into a network and record inputs and outputs of its layers."""

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fedtune.errors import ModelError

__all__ = ["hook_layers", "use_state_dict"]


@contextmanager
def hook_layers(net: nn.Module, layers: Set[str], note: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``note`` with the name, input and output of each of these layers after it has run."""
    handles = [net.get_submodule(layer).register_forward_hook(_hook(layer, note)) for layer in sorted(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(layer: str, note: Callable[[str, Tensor, Tensor], None]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        note(layer, inputs[0], output)

    return hook


@contextmanager
def use_state_dict(net: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the block with these weights, in evaluation mode; the network's own weights are restored afterwards."""
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    unknown = net.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise ModelError(f"merge: the model has no {unknown[0]!r}; give the architecture that was merged")
    net.eval()
    try:
        yield
    finally:
        net.load_state_dict(own)
