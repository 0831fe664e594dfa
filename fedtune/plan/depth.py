"""The trace of a deep model from two short ones, where that is exact.

With like blocks, the bytes that a step keeps are affine in their number L: x(L) = x(a) + (L - a) (x(a + 1) - x(a)). The
peak is the largest of several affine numbers, one for each moment of the step. While the last block is processed, all
blocks are kept, so that moment's number grows as fast as what is kept, and none grows faster. If the peaks of both
short models differ by just that, the peak of the deep one is known. Otherwise the deep model itself is traced.

With gradients, a moment's number grows by what a block keeps or by its gradients, whichever of both it still or already
holds. If the peaks with gradients differ by the larger of the two, that of the deep model is known. Otherwise it is
bounded by the peak without gradients and all gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedtune.plan.data_answers import DataAnswers
from fedtune.plan.step_trace import RoundTrace, Shapes, TracedModel, build_traced_model, list_shapes, trace_rounds
from fedtune.recipe.schema import Recipe

__all__ = ["ModelTrace", "trace_model"]


@dataclass(frozen=True)
class ModelTrace:
    """The rounds of a step, for each batch size in the order asked for, and the shapes of the model's tensors.

    ``traced_blocks`` is the number of blocks of the deepest model that was traced.
    """

    by_batch_size: list[list[RoundTrace]]
    shapes: Shapes = field(repr=False)
    model: TracedModel = field(repr=False)
    traced_blocks: int | None


def trace_model(recipe: Recipe, labels: Sequence[str], batch_sizes: Sequence[int], answers: DataAnswers) -> ModelTrace:
    """Trace a step at several batch sizes, with few blocks if that is exact."""
    other = build_traced_model(recipe, labels, 1)
    found = [trace_rounds(other, recipe, labels, size, answers) for size in batch_sizes]
    if other.blocks is None:
        return ModelTrace(found, list_shapes(other), other, None)
    one = build_traced_model(recipe, labels, 0)
    less = [trace_rounds(one, recipe, labels, size, answers) for size in batch_sizes]
    if all(_is_affine(a, b) for few, many in zip(less, found, strict=True) for a, b in zip(few, many, strict=True)):
        deep = [
            [_extrapolate(a, b, one) for a, b in zip(few, many, strict=True)]
            for few, many in zip(less, found, strict=True)
        ]
        return ModelTrace(deep, list_shapes(other), other, other.depth)
    whole = build_traced_model(recipe, labels, None)
    found = [trace_rounds(whole, recipe, labels, size, answers) for size in batch_sizes]
    return ModelTrace(found, list_shapes(whole), whole, other.blocks.count)


def _is_affine(few: RoundTrace, many: RoundTrace) -> bool:
    return many.peak_bytes - few.peak_bytes == many.kept_bytes - few.kept_bytes


def _grows_fastest(few: RoundTrace, many: RoundTrace) -> bool:
    """Whether no moment's bytes grow faster than the peak with gradients does from block to block."""
    fastest = max(many.kept_bytes - few.kept_bytes, many.gradient_bytes - few.gradient_bytes)
    return many.step_bytes - few.step_bytes == fastest


def _extrapolate(few: RoundTrace, many: RoundTrace, shallow: TracedModel) -> RoundTrace:
    """Return the trace at the full number of blocks."""
    blocks = shallow.blocks
    assert blocks is not None
    more = blocks.count - shallow.depth

    def extend(name: str) -> int:
        a, b = getattr(few, name), getattr(many, name)
        return int(a + more * (b - a))

    peak, gradients = extend("peak_bytes"), extend("gradient_bytes")
    step = extend("step_bytes") if _grows_fastest(few, many) else peak + gradients
    names = tuple(blocks.expand_all(many.trained))
    return RoundTrace(extend("kept_bytes"), peak, step, gradients, extend("flops"), names)
