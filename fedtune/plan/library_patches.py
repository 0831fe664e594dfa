"""Changes to libraries that a process needs to trace steps without data. Use them in a process that only plans."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

__all__ = ["patch_libraries"]


@contextmanager
def patch_libraries() -> Iterator[None]:
    """Let models be built and run from tensors without data inside the block."""
    from fedtune.techniques._codecs.activation_file import ActivationFile
    from fedtune.techniques.mobile import _output_cache

    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(patch.object(_output_cache, "_hash_tensors", _name_nothing))
        stack.enter_context(patch.object(_output_cache.OutputCache, "write_output", _write_nothing))
        stack.enter_context(patch.object(ActivationFile, "write", _reserve_slot))
        stack.enter_context(patch.object(ActivationFile, "read", _read_slot))
        for patcher in _patch_transformers():
            stack.enter_context(patcher)
        yield


def _patch_transformers() -> list[Any]:
    """transformers takes tensors without data for a compiler's. It would build masks that a real step leaves out."""
    try:
        from transformers import masking_utils
    except ImportError:  # a minimal install
        return []
    return [patch.object(masking_utils, "is_tracing", lambda *_: False)]


def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do as ``nn.Module._apply``, which cannot swap parameters without data."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = _change_parameter(parameter, function)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _change_parameter(parameter: nn.Parameter, function: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """A parameter that ``function`` does not change stays the same object, so that weights stay tied."""
    with torch.no_grad():
        changed = function(parameter)
    return parameter if changed is parameter else nn.Parameter(changed, parameter.requires_grad)


def _name_nothing(*_: Any) -> str:
    return "planned"


def _reserve_slot(_: Any, flat: Tensor) -> Any:
    from fedtune.techniques._codecs.activation_file import Slot

    return Slot(0, len(flat), -1)


def _read_slot(_: Any, slot: Any) -> Tensor:
    return torch.empty(slot.size, dtype=torch.uint8)


def _write_nothing(*_: Any) -> None:
    """Outputs without data are not cached."""
