"""Answers what code asks of tensors without data: whether they are equal, a number in them, how many entries count.

A traced step knows sizes but no values. ``RULES`` has an entry for each function of the product that asks. A technique
that asks something else fails with the name of the function and the question, so that no plan rests on a guess.
"""

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune.errors import FedtuneError
from fedtune.plan.answer_rules import RULES, Question, QuestionOperands
from fedtune.plan.flops import count_flops

__all__ = ["DataAnswers", "UnansweredError"]


class UnansweredError(FedtuneError):
    """Code asked something of data that has no entry in ``RULES``."""


class DataAnswers(TorchDispatchMode):
    """Answers questions about data inside the block, and counts floating-point operations.

    ``asked`` are all questions so far. Enter it after FakeTensorMode and before a meter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[Question] = set()
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, so torch's compiler is not imported."""
        return False

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if (kind := _find_kind(func, args)) is not None:
            return self._answer(kind, args, dict(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.flops += count_flops(func, args, dict(kwargs or {}), out)
        return out

    def _answer(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = _find_frame(sys._getframe(2))
        question = Question(kind, _name_function(frame))
        self.asked.add(question)
        rule = RULES.get(question)
        if rule is None:
            raise UnansweredError(
                f"{question.asker} asks a tensor without data for {kind}, so its step cannot be planned; measure it "
                "with fedtune profile, or add the question to fedtune/plan/answer_rules.py"
            )
        return rule(QuestionOperands(args, kwargs, frame.f_locals))


def _find_kind(func: Callable[..., Any], args: tuple[Any, ...]) -> str | None:
    """Return what an operation asks of data, None if it needs sizes alone."""
    if func is torch.ops.aten._local_scalar_dense.default:
        return "bool" if args[0].dtype == torch.bool else "float" if args[0].is_floating_point() else "int"
    if func in _MASKED and any(isinstance(one, Tensor) and one.dtype in _MASKS for one in args[1]):
        return "mask_index"
    return _KINDS.get(func)


_KINDS: dict[object, str] = {
    torch.ops.aten.equal.default: "equal",
    torch.ops.aten.nonzero.default: "nonzero",
    torch.ops.aten.masked_select.default: "masked_select",
    torch.ops.aten.bincount.default: "bincount",
    torch.ops.aten._unique2.default: "unique",
    torch.ops.aten.repeat_interleave.Tensor: "repeat_interleave",
}
_MASKED = (torch.ops.aten.index.Tensor,)
_MASKS = (torch.bool, torch.uint8)


def _find_frame(frame: FrameType | None) -> FrameType:
    """Return the innermost function that is neither torch's nor the meter's."""
    while frame is not None and _is_machinery(str(frame.f_globals.get("__name__", ""))):
        frame = frame.f_back
    assert frame is not None
    return frame


def _is_machinery(module: str) -> bool:
    return module.partition(".")[0] in ("torch", "contextlib") or module in (__name__, "fedtune.memory.meter")


def _name_function(frame: FrameType) -> str:
    """Return the module and the function, without the comprehensions inside it."""
    return f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname.partition('.<locals>')[0]}"
