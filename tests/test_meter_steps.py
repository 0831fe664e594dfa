"""Whole steps: gradients of parameters are told apart, and torch's own allocator agrees with the meter."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fedtune.memory import StorageMeter

FLOAT = 4
ROWS = 32


def a_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 4))


def test_gradients_of_parameters_are_told_apart() -> None:
    model, batch = a_model(), torch.randn(ROWS, 64)
    with StorageMeter(excluded=model.parameters()) as meter:
        model(batch).sum().backward()
    assert meter.current_bytes == batch.nbytes
    assert meter.gradient_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_a_gradient_leaves_the_peak_from_its_making_on_even_if_it_is_used_up_at_once() -> None:
    model, batch = a_model(), torch.randn(ROWS, 64)
    used: list[str] = []

    def use_up(parameter: Tensor) -> None:
        parameter.grad = None
        used.append("")

    with StorageMeter(excluded=model.parameters()) as meter:
        model(batch).sum().backward()
    with StorageMeter(excluded=model.parameters()) as emptied:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(use_up)
        model.zero_grad()
        model(batch).sum().backward()
    assert len(used) == len(list(model.parameters()))
    assert emptied.gradient_bytes == 0
    assert emptied.peak_bytes == meter.peak_bytes < kept_and_gradients(model, batch)


def kept_and_gradients(model: nn.Module, batch: Tensor) -> int:
    with StorageMeter() as meter:
        loss = model(batch).sum()
    found = meter.current_bytes
    del loss
    return found + sum(parameter.nbytes for parameter in model.parameters())


class EagerGradient(torch.autograd.Function):
    """w -> sum(w), with the gradient made in the forward pass and handed out in the backward pass."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.gradient = torch.ones_like(weight)
        return weight.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient: Tensor = ctx.gradient.mul_(gradients[0])
        del ctx.gradient
        return gradient


def test_what_is_kept_from_the_forward_pass_counts_though_it_ends_as_a_gradient() -> None:
    weight = torch.ones(100, requires_grad=True)
    with StorageMeter(excluded=[weight]) as meter:
        loss: Tensor = EagerGradient.apply(weight)
        kept = meter.current_bytes
        loss.backward()
    assert weight.grad is not None
    assert kept == 100 * FLOAT + FLOAT
    assert meter.peak_bytes >= kept


def test_a_weight_that_serves_twice_has_no_higher_peak_than_two_that_serve_once() -> None:
    batch = torch.randn(ROWS, 64)

    def peak(first: Tensor, second: Tensor) -> int:
        with StorageMeter(excluded={first, second}) as meter:
            ((batch @ first).relu() @ second).square().sum().backward()
        assert meter.current_bytes == batch.nbytes
        return meter.peak_bytes

    one, two, both = (torch.randn(64, 64, requires_grad=True) for _ in range(3))
    assert peak(both, both) == peak(one, two)
    assert peak(both, both) == peak(one, two)  # also where gradients are added to those of the step before


def test_sparse_gradients_have_no_storage_and_pass_by() -> None:
    table, ids = nn.Embedding(10, 4, sparse=True), torch.tensor([1, 2])
    with StorageMeter(excluded=table.parameters()) as meter:
        (table(ids) + table(ids)).sum().backward()
    assert meter.gradient_bytes == 0


class WritingItself(torch.autograd.Function):
    """Writes a parameter's gradient in its backward pass, past autograd, and leaves a tensor of that size behind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: list[Tensor], left: list[Tensor]) -> Tensor:
        ctx.weight, ctx.left = weight, left
        return x.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.weight[0].grad = 2 * torch.ones(100)
        ctx.left.append(torch.ones(100))
        return torch.ones(8), None, None


def test_a_gradient_that_a_function_writes_past_autograd_is_told_apart() -> None:
    weight, batch = torch.ones(100, requires_grad=True), torch.ones(8, requires_grad=True)
    left: list[Tensor] = []
    with StorageMeter(excluded=[weight, batch]) as meter:
        loss: Tensor = WritingItself.apply(batch, [weight], left)
        loss.backward()
        del loss
    assert meter.gradient_bytes == (100 + 8) * FLOAT
    assert meter.current_bytes == left[0].nbytes


def allocator(run: Callable[[], Tensor]) -> tuple[int, int, Tensor]:
    """What torch's own allocator reports: bytes left at the end, and at the worst moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        out = run()
    found = profiled.profiler.kineto_results.events()
    events: Sequence[Any] = sorted((e for e in found if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = [0]
    for event in events:
        held.append(held[-1] + event.nbytes())
    return held[-1], max(held), out


def test_the_allocator_of_torch_agrees_to_the_byte() -> None:
    model, batch = a_model(), torch.randn(ROWS, 64)
    left, worst, loss = allocator(lambda: model(batch).sum())
    with StorageMeter(excluded=model.parameters()) as meter:
        metered = model(batch).sum()
        kept, peak = meter.current_bytes, meter.peak_bytes
    assert (kept, peak) == (left + batch.nbytes, worst + batch.nbytes)  # it was there before, and is kept
    del loss, metered


def test_the_allocator_of_torch_agrees_on_the_peak_of_a_whole_step() -> None:
    model, batch = a_model().requires_grad_(False), torch.randn(ROWS, 64, requires_grad=True)

    def step() -> Tensor:
        (gradient,) = torch.autograd.grad(model(batch).square().sum(), [batch])
        return gradient

    left, worst, gradient = allocator(step)
    with StorageMeter(excluded=[*model.parameters(), batch]) as meter:
        metered = step()
    assert (meter.current_bytes, meter.peak_bytes) == (left, worst)
    del gradient, metered


def test_where_two_gradients_meet_the_peak_is_above_the_truth_by_one_tensor_at_most() -> None:
    batch = torch.randn(ROWS, 64, requires_grad=True)

    def step() -> Tensor:
        hidden = batch.exp()
        (gradient,) = torch.autograd.grad((hidden.sin() + hidden.cos() + hidden).sum(), [batch])
        return gradient

    _, worst, gradient = allocator(step)
    with StorageMeter(excluded=[batch]) as meter:
        metered = step()
    assert worst <= meter.peak_bytes <= worst + batch.nbytes
    del gradient, metered


def test_results_and_gradients_are_those_without_the_meter() -> None:
    model, batch = a_model(), torch.randn(ROWS, 64)
    plain = torch.autograd.grad(model(batch).square().sum(), list(model.parameters()))
    with StorageMeter(excluded=model.parameters()):
        loss = model(batch).square().sum()
    metered = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(plain, metered, strict=True))


def test_the_meter_stops_with_the_block_even_on_a_fault() -> None:
    with pytest.raises(ValueError, match="planted"), StorageMeter() as meter:
        raise ValueError("planted")
    made = torch.ones(10)
    assert meter.current_bytes == 0
    del made
