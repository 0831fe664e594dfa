"""The device that a model computes on: the processor, or an accelerator that torch can use.

Random numbers that decide about a run (orders, masks, new weights) are drawn on the CPU and moved, so that they are the
same everywhere. Only dropout inside a model uses the accelerator's own generator, which is seeded like the CPU's.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError, RecipeError

__all__ = [
    "choose_device",
    "find_device",
    "fork_random_state",
    "is_available",
    "is_out_of_memory",
    "move_tensors",
    "release_memory",
    "require_device",
    "seed_generators",
    "synchronise",
    "use_autocast",
]

_CPU = torch.device("cpu")
_PREFERRED = ("cuda", "mps")
"""What ``auto`` looks for, before it takes the CPU."""


def is_available(device_type: str) -> bool:
    """Return whether torch can compute on a device of this type here."""
    if device_type == "cuda":
        return torch.cuda.is_available()
    if device_type == "mps":
        return torch.backends.mps.is_available()
    return device_type == "cpu"


def choose_device(setting: str) -> torch.device:
    """Return the device of a recipe's setting: for ``auto`` the best one here, for one that is missing the CPU."""
    wanted = next(filter(is_available, _PREFERRED), "cpu") if setting == "auto" else setting
    if not is_available(wanted):
        return _CPU
    return torch.device("cuda", torch.cuda.current_device()) if wanted == "cuda" else torch.device(wanted)


def require_device(setting: str, key: str = "train.device") -> torch.device:
    """Return the device of a setting; RecipeError if there is none of its type here."""
    if setting != "auto" and not is_available(setting):
        raise RecipeError(f"{key}: torch finds no {setting} device on this machine; set it to auto or cpu")
    return choose_device(setting)


def find_device(model: nn.Module) -> torch.device:
    """Return the device that holds a model; ModelError if it is spread over several. A model without tensors is on
    the CPU.
    """
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())} - {torch.device("meta")}
    if len(places) > 1:
        names = " and ".join(sorted(map(str, places)))
        raise ModelError(f"{type(model).__name__} lies on {names}; move it to one device, e.g. model.to('cuda')")
    return next(iter(places), _CPU)


def move_tensors(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors on a device. Those that are there already are not copied."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@contextmanager
def fork_random_state(device: torch.device) -> Iterator[None]:
    """Restore the generators of the CPU and of the device at the end of the block."""
    with torch.random.fork_rng(devices=[]):
        if device.type == "cpu":
            yield
            return
        backend: Any = torch.get_device_module(device)
        before = backend.get_rng_state()
        try:
            yield
        finally:
            backend.set_rng_state(before)


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of the device."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work, so that a clock reads the time of the work itself."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def use_autocast(model: nn.Module) -> AbstractContextManager[Any]:
    """Return autocast to bfloat16 for a model in bfloat16 on an accelerator. On the CPU nothing changes.

    Products stay in bfloat16, and losses, norms and softmax get single precision. Only a forward pass needs it.
    """
    device = find_device(model)
    if device.type == "cpu" or all(one.dtype != torch.bfloat16 for one in model.parameters()):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


_OUT_OF_MEMORY = (
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "std::bad_alloc",
    "could not create a memory",
)
"""What torch, the C++ library and oneDNN say."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that an accelerator's memory is full, or that this process may take no more."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def release_memory(device: torch.device) -> None:
    """Return an accelerator's unused memory, which torch keeps, to the device."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
