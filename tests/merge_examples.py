"""Every combining step with settings, and small models in memory that it merges."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtune.merging import CombineStep, MergeContext, MergeInput, bind_combine, build_pipeline
from fedtune.recipe.schema import Unit

__all__ = [
    "METHODS",
    "SHAPES",
    "Held",
    "Method",
    "a_model",
    "a_step",
    "merged",
    "models",
    "operands",
    "plain",
    "reference",
    "settled_and_merged",
    "thinning",
    "whole",
]

Tensors = Mapping[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "bias": (19,),
    "weight": (23, 14),
    "kernel": (6, 3, 2, 2),
    "none": (0, 3),
}


class Method(NamedTuple):
    """How a step is set so that it keeps every entry, and so that it does all it can; which identities it has then.

    ``same``: models that are equal give that model. ``alone``: so does one whose weight is one where the others' are
    zero. ``symmetric``: the order of models does not matter.
    """

    plain: Mapping[str, Any] = {}
    full: Mapping[str, Any] = {}
    models: int = 3
    same: bool = True
    alone: bool = True
    symmetric: bool = True


METHODS: dict[str, Method] = {
    "mean": Method(),
    "linear": Method(),
    "task-arithmetic": Method(full={"scale": 0.7, "normalise": True}),
    "slerp": Method(full={"t": 0.3}, models=2, alone=False, symmetric=False),  # t, not weights, says whose side
    "nuslerp": Method(full={"over": "column"}, models=2),
    "multislerp": Method(),
    "karcher": Method(),
    "model-stock": Method(full={"over": "row"}, alone=False),  # all models count the same
    "geometric-median": Method(full={"distances": "tensor"}),
    "ties": Method({"density": 1.0}, {"density": 0.3, "scale": 1.2}),
    "dare-linear": Method({"density": 1.0}, {"density": 0.4}),
    "dare-ties": Method({"density": 1.0}, {"density": 0.4}),
    "della-linear": Method(full={"density": 0.4}, same=False, alone=False, symmetric=False),  # it always drops some
    "della": Method(full={"density": 0.4}, same=False, alone=False, symmetric=False),
    "breadcrumbs": Method({"density": 1.0}, {"density": 0.6, "gamma": 0.1}),
    "breadcrumbs-ties": Method({"density": 1.0}, {"density": 0.6, "gamma": 0.1}),
    "magmax": Method({"scale": 1.0}, {"scale": 0.5}, alone=False),  # no weights; only a tie knows an order
    "opcm": Method(full={"alpha": 0.3}, same=False, alone=False, symmetric=False),  # vectors add up; later ones yield
    "sce": Method(full={"select_topk": 0.4}, alone=False),  # squares, not weights, say how much a model counts
    "trimmed-mean": Method({"share": 0.34}, alone=False),  # all models count the same
    "median": Method(alone=False),
    "krum": Method(models=5, alone=False),
    "multi-krum": Method(full={"m": 2}, models=5, alone=False),
    "bulyan": Method(models=7, alone=False, symmetric=False),  # each of two nearest neighbours has the same score
    "centred-clipping": Method({"radius": 1e3}, {"iterations": 3}, alone=False),
    "fltrust": Method(same=False, alone=False),  # the length is that of the root update
    "fisher": Method(),
    "regmean": Method(full={"shrink": 0.5}),
    "lorm": Method(),
}


class Held(dict[str, Tensor]):
    """Tensors in memory, read like an operand's."""

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one."""
        return self[name][start:stop] if self[name].dim() else self[name]


def a_model(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Normal values; models of different seeds share a part, so that they are neither parallel nor orthogonal."""
    common, own = torch.Generator().manual_seed(1000), torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=common) + torch.randn(shape, generator=own) for name, shape in shapes.items()
    }


def models(count: int) -> list[dict[str, Tensor]]:
    """Different models."""
    return [a_model(seed) for seed in range(count)]


def plain(name: str) -> CombineStep:
    """A step that keeps every entry."""
    return a_step(name, METHODS[name].plain)


def thinning(name: str) -> CombineStep:
    """A step that does all it can."""
    return a_step(name, METHODS[name].full or METHODS[name].plain)


def a_step(name: str, settings: Mapping[str, Any]) -> CombineStep:
    """A step by its name."""
    return build_pipeline([Unit(name=name, settings=dict(settings))]).combine


def operands(
    step: CombineStep, deltas: Sequence[Tensors], weights: Sequence[float], knobs: Mapping[str, float] | None = None
) -> list[MergeInput]:
    """Models in memory, with statistics where the step needs them."""
    return [
        MergeInput(Held(delta), weight, knobs or {}, _statistics(step, index, delta))
        for index, (delta, weight) in enumerate(zip(deltas, weights, strict=True))
    ]


def _statistics(step: CombineStep, index: int, delta: Tensors) -> Held | None:
    random = torch.Generator().manual_seed(50)
    if step.name == "fisher":
        return Held({name: torch.rand(tensor.shape, generator=random) for name, tensor in delta.items()})
    if step.name in ("regmean", "lorm"):
        inputs = torch.randn(40, 14, generator=random.manual_seed(index))
        return Held({"weight": inputs.T @ inputs / 40})
    return None


def merged(
    step: CombineStep, deltas: Sequence[Tensors], weights: Sequence[float] | None = None, draw: int = 0
) -> dict[str, Tensor]:
    """The merged delta of every tensor; weights are equal shares unless given."""
    given = weights or [1 / len(deltas)] * len(deltas)
    shapes = {name: tuple(tensor.shape) for name, tensor in deltas[0].items()}
    return settled_and_merged(step, operands(step, deltas, given), shapes, draw)


def settled_and_merged(
    step: CombineStep, given: Sequence[MergeInput], shapes: Mapping[str, tuple[int, ...]] = SHAPES, draw: int = 0
) -> dict[str, Tensor]:
    """The merged delta of every tensor."""
    settled = bind_combine(step, shapes, given, MergeContext(round_number=draw, reference=reference(step, shapes)))
    return {name: whole(settled.combine, name, shape, settled.merge_inputs) for name, shape in shapes.items()}


def reference(step: CombineStep, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """What the server trained on its own examples, for a step that compares models with it."""
    return a_model(77, shapes) if step.reference == "root data" else {}


def whole(step: CombineStep, name: str, shape: tuple[int, ...], given: Sequence[MergeInput]) -> Tensor:
    """One tensor's merged delta, from its pieces."""
    found = [piece.reshape(-1) for piece in step.combine(name, shape, given)]
    return torch.cat([torch.empty(0), *found]).reshape(shape)
