"""A card that does not exist: tensors say that they lie on card:0, and compute on the CPU.

It refuses what a real card refuses: an operation on tensors of both devices (0-dimensional CPU tensors may take part,
and CPU indices), a NumPy view, and a generator of the other device. It counts what a real card waits for: every value
or tensor that goes back to the CPU. So the same numbers come out as on the CPU, and nothing is approximate.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fedtune import accelerator

__all__ = ["CARD", "Card", "use_card"]

NAME = "card"
_CPU = torch.device("cpu")
_aten = torch.ops.aten
_WAITS = {_aten._local_scalar_dense.default: "item", _aten.equal.default: "equal", _aten.nonzero.default: "nonzero"}
_SHAPES = {_aten.masked_select.default: "masked_select", _aten.repeat_interleave.Tensor: "repeat_interleave"}
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default}
_TWO_DEVICES = {_aten.copy_.default, _aten._to_copy.default}


class _Backend:
    """What torch asks of a device's module: ``torch.card``."""

    state = torch.zeros(1, dtype=torch.uint8)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_rng_state(self, *_: Any) -> Tensor:
        return self.state.clone()

    def set_rng_state(self, new: Tensor, *_: Any) -> None:
        self.state = new

    def manual_seed(self, seed: int) -> None:
        self.state = torch.tensor([seed % 251], dtype=torch.uint8)

    def manual_seed_all(self, seed: int) -> None:
        self.manual_seed(seed)

    def _is_in_bad_fork(self) -> bool:
        return False

    def synchronize(self, *_: Any) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _register() -> torch.device:
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    return torch.device(NAME, 0)


CARD = _register()

_LOWER = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv1d", "conv2d", "scaled_dot_product_attention")
_FP32 = ("layer_norm", "group_norm", "softmax.int", "log_softmax.int", "nll_loss", "cross_entropy_loss", "mse_loss")
_MORE_FP32 = (
    "binary_cross_entropy_with_logits",
    "cosine_similarity",
    "exp",
    "log",
    "pow.Tensor_Scalar",
    "rsqrt",
    "norm.Scalar",
)
# The lists of CUDA, as far as models here use them.
_KEY: Any = torch._C.DispatchKey.AutocastPrivateUse1  # type: ignore[attr-defined]


def _cast_and_run(name: str, dtype: torch.dtype | None) -> Any:
    packet, _, overload = name.partition(".")
    func = getattr(getattr(_aten, packet), overload or "default")

    def run(*args: Any, **kwargs: Any) -> Any:
        kind = dtype or torch.get_autocast_dtype(NAME)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_KEY)):
            return func(*tree_map(partial(_cast, kind), args), **tree_map(partial(_cast, kind), kwargs))

    return run


def _cast(dtype: torch.dtype, one: Any) -> Any:
    able = isinstance(one, Tensor) and one.is_floating_point() and one.dtype != torch.float64
    return one.to(dtype) if able else one


_autocast = [torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL", _KEY.name)]
for _names, _dtype in ((_LOWER, None), ((*_FP32, *_MORE_FP32), torch.float32)):
    for _name in _names:
        _autocast[0].impl(_name, _cast_and_run(_name, _dtype), _KEY.name)
_autocast[1].fallback(torch.library.fallthrough_kernel)


@dataclass
class Seen:
    """What a real card would be waited for, and the bytes of each tensor that was sent to it."""

    waits: Counter[str] = field(default_factory=Counter)
    arrived: list[int] = field(default_factory=list)


class CardTensor(Tensor):
    """A tensor of the card; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "CardTensor":
        out = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CARD,
            requires_grad=False,
        )
        out.held = held
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> "CardTensor":
        return memo.setdefault(id(self), CardTensor(self.held.clone()))  # type: ignore[no-any-return]

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert a tensor of the card to numpy; use Tensor.cpu()")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}), Seen())


class Card(TorchDispatchMode):
    """Makes the tensors that are asked for on the card, and counts what a card would be waited for and sent."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = Seen()
        self.waits, self.arrived = self._seen.waits, self._seen.arrived

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}), self._seen)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: Seen) -> Any:
    """Run an operation on what the tensors hold; the result is on the card if its inputs, or its device, are."""
    asked = kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [one for one in tensors if isinstance(one, CardTensor)]
    on_card = asked.type == NAME if asked is not None else bool(ours)
    if func in _WAITS or func in _SHAPES:
        seen.waits[{**_WAITS, **_SHAPES}[func]] += bool(ours)
    if func in (_aten.index.Tensor,) and any(
        isinstance(one, CardTensor) and one.dtype in (torch.bool, torch.uint8) for one in tree_leaves(args[1])
    ):
        seen.waits["mask"] += 1
    if func in _TWO_DEVICES:
        on_card = _move(func, args, asked, seen)
    else:
        _refuse_mixed(func, args, tensors, ours)
    plain_args, plain_kwargs = tree_map(_unwrap, (args, kwargs))
    if asked is not None and asked.type == NAME:
        plain_kwargs["device"] = _CPU
    plain_kwargs.pop("pin_memory", None)
    out = func(*plain_args, **plain_kwargs)
    if not on_card:
        return out
    wrapped = tree_map(lambda one: CardTensor(one) if isinstance(one, Tensor) else one, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours else wrapped


def _move(func: Any, args: tuple[Any, ...], asked: torch.device | None, seen: Seen) -> bool:
    """Whether the result of a copy is on the card; a copy to the CPU is waited for."""
    source = args[1] if func is _aten.copy_.default else args[0]
    here = isinstance(source, CardTensor)
    if func is _aten.copy_.default:
        target = isinstance(args[0], CardTensor)
    else:
        target = here if asked is None else asked.type == NAME
    seen.waits["to cpu"] += here and not target
    if target and not here:
        seen.arrived.append(source.nbytes)
    return target


def _refuse_mixed(func: Any, args: tuple[Any, ...], tensors: list[Tensor], ours: list[CardTensor]) -> None:
    if not ours or len(ours) == len(tensors):
        return
    others = [one for one in tensors if not isinstance(one, CardTensor)]
    if func in _INDEXED and isinstance(args[0], CardTensor):
        values = [one for one in args[2:3] if isinstance(one, Tensor) and not isinstance(one, CardTensor) and one.dim()]
        if not values:
            return
    if any(one.dim() for one in others):
        shapes = [tuple(one.shape) for one in others if one.dim()]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} met CPU tensors {shapes}")


def _unwrap(one: Any) -> Any:
    return one.held if isinstance(one, CardTensor) else one


@contextmanager
def use_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """Inside the block torch says that there is a card."""
    with monkeypatch.context() as patched, ExitStack() as stack:
        patched.setattr(accelerator, "_PREFERRED", (NAME,))
        patched.setattr(accelerator, "is_available", lambda kind: kind in ("cpu", NAME))
        patched.setattr(accelerator, "choose_device", lambda setting: CARD if setting in ("auto", NAME) else _CPU)
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        yield stack.enter_context(Card())
