"""Check a merge step on two tiny states."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.library.check_result import CheckResult, require, run_check
from fedtune.merging import CombineStep, MergeContext, MergeInput, RelaxStep, ServerOptimiserStep, bind_combine
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import NamedUnit, build_unit
from fedtune.wire.client_update import iter_row_chunks

__all__ = ["check_merge_step"]

_SHAPES = {"matrix": (6, 5), "vector": (5,), "number": (), "kernel": (4, 3, 2, 2)}


def check_merge_step(name: str) -> Iterator[CheckResult]:
    """Check a step that combines, relaxes or moves the state, tensor by tensor; others need a model and are skipped."""
    step: NamedUnit = build_unit("fedtune.merging", Unit(name=name), "merge")
    if isinstance(step, ServerOptimiserStep):
        yield run_check("moves a tiny state twice", partial(_check_server_step, step))
        return
    needs = sorted(getattr(step, "needs", ()))
    if needs or not isinstance(step, CombineStep | RelaxStep):
        yield CheckResult("skipped", "merges two tiny states", f"it needs {', '.join(needs) or 'whole models'}")
        return
    if isinstance(step, CombineStep) and step.update_kind != "tensors":
        yield CheckResult("skipped", "merges two tiny states", f"it merges {step.update_kind}")
        return
    for kind, shape in _SHAPES.items():
        what = f"merges a {kind} of two tiny states"
        yield run_check(what, partial(_check_shape, step, kind, shape), RecipeError)  # e.g. one that needs statistics


def _check_server_step(step: ServerOptimiserStep) -> None:
    delta = _draw_deltas(0)["matrix"].double()
    moments = {kind: torch.full_like(delta, value) for kind, value in step.initial_moments.items()}
    kept = {kind: one.clone() for kind, one in moments.items()}
    first, changed = step.compute_step(delta.clone(), moments)
    again, _ = step.compute_step(delta.clone(), moments)
    require(bool(first.isfinite().all()), "the move is not finite")
    require(torch.equal(first, again), "two steps from the same moments differ")
    require(changed.keys() == kept.keys(), "the next moments have other names than the initial ones")
    require(all(torch.equal(one, moments[kind]) for kind, one in kept.items()), "the step changes its moments in place")


def _check_shape(step: CombineStep | RelaxStep, name: str, shape: tuple[int, ...]) -> None:
    states = [_draw_deltas(seed) for seed in range(max(2, getattr(step, "required_models", 2)))]
    kept = [{key: one.clone() for key, one in state.items()} for state in states]
    first, second = _merge(step, name, shape, states), _merge(step, name, shape, states)
    require(bool(first.isfinite().all()), "the result is not finite")
    require(first.dtype == torch.float32, f"the result is {first.dtype}, but must be float32")
    require(torch.equal(first, second), "two merges of the same models differ")
    unchanged = all(
        torch.equal(one, was[key]) for state, was in zip(states, kept, strict=True) for key, one in state.items()
    )
    require(unchanged, "the step changes its inputs")


def _merge(step: CombineStep | RelaxStep, name: str, shape: tuple[int, ...], states: list[dict[str, Tensor]]) -> Tensor:
    if isinstance(step, RelaxStep):
        relaxed = step.relax(name, 0, states[0][name].clone(), MergeContext())
        require(relaxed.shape == states[0][name].shape, "the relaxed rows have another shape")
        return relaxed
    inputs = [MergeInput(_Rows(state), 1 / len(states)) for state in states]
    bound = bind_combine(step, _SHAPES, inputs, MergeContext())
    chunks = list(bound.combine.combine(name, shape, bound.merge_inputs))
    require(len(chunks) == len(list(iter_row_chunks(shape))), "the chunks are not those of iter_row_chunks(shape)")
    whole = torch.cat([chunk.reshape(-1) for chunk in chunks])
    require(whole.numel() == states[0][name].numel(), "the result has another number of entries")
    return whole


class _Rows:
    """Rows of a state, as a merge reads them: copies."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        tensor = self._state[name]
        return tensor[start:stop].clone() if tensor.dim() else tensor.reshape(1).clone()


def _draw_deltas(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in _SHAPES.items()}
