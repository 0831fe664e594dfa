import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fedtune.memory import StorageMeter, peak_rss, reset_peak_rss

ROWS = 32
FLOAT = 4
LOSS = FLOAT

ReLU, GELU = nn.ReLU, nn.GELU


def linear(wide: int, high: int) -> nn.Linear:
    return nn.Linear(wide, high)


def kept(model: nn.Module, width: int) -> int:
    """Bytes the meter counts after a forward pass, with nothing but the loss held."""
    batch = torch.randn(ROWS, width)
    with StorageMeter(excluded=model.parameters()) as meter:
        loss = model(batch).sum()
        found = meter.bytes
    del loss
    return found


def hook_alone(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """What a saved-tensor hook by itself would count."""
    seen: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum(seen.values())


@pytest.mark.parametrize(
    ("model", "width", "columns"),
    [
        (nn.Sequential(linear(5, 7)), 5, 5),
        (nn.Sequential(linear(5, 7), ReLU()), 5, 5 + 7),
        (nn.Sequential(linear(5, 7), GELU()), 5, 5 + 7),
        (nn.Sequential(linear(5, 7), ReLU(), linear(7, 9)), 5, 5 + 7),
        (nn.Sequential(linear(5, 7), GELU(), linear(7, 9)), 5, 5 + 7 + 7),
        (nn.Sequential(linear(5, 7), ReLU(), linear(7, 9), GELU(), linear(9, 3)), 5, 5 + 7 + 9 + 9),
    ],
    ids=["input", "output of ReLU", "input of GELU", "ReLU shares", "GELU does not", "stack"],
)
def test_the_bytes_kept_for_the_backward_pass_are_those_of_the_closed_form(
    model: nn.Module, width: int, columns: int
) -> None:
    assert kept(model, width) == ROWS * columns * FLOAT + LOSS


def test_frozen_layers_keep_no_input_for_a_weight_gradient() -> None:
    model = nn.Sequential(linear(5, 7), ReLU(), linear(7, 9), ReLU(), linear(9, 3)).requires_grad_(False)
    model[4].requires_grad_(True)
    assert kept(model, 5) == ROWS * 9 * FLOAT + LOSS


def test_without_gradients_nothing_but_the_result_is_kept() -> None:
    assert kept(nn.Sequential(linear(5, 7), GELU()).requires_grad_(False), 5) == LOSS


def test_parameters_are_excluded_and_would_else_be_seen() -> None:
    model, batch = nn.Sequential(linear(5, 7), ReLU(), linear(7, 9)), torch.randn(ROWS, 5)
    weights = sum(parameter.nbytes for name, parameter in model.named_parameters() if name.endswith("weight"))
    with StorageMeter() as meter:
        loss = model(batch).sum()
        found = meter.bytes
    assert found == kept(model, 5) + weights
    del loss


class Checkpointed(nn.Module):
    """As in transformers: the hidden states go in by position, what belongs to the positions by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.block = nn.Sequential(nn.Linear(7, 64), GELU(), nn.Linear(64, 7))

    def rotated(self, hidden: Tensor, turn: Tensor) -> Tensor:
        out: Tensor = self.block(hidden * turn)
        return out

    def forward(self, batch: Tensor) -> Tensor:
        turn = torch.outer(batch[:, 0], torch.arange(7.0)).cos()
        block = partial(self.rotated, turn=turn)
        out: Tensor = checkpoint(block, self.first(batch), use_reentrant=False, preserve_rng_state=False)
        return out


def test_what_a_checkpointed_block_holds_is_counted_where_a_hook_alone_misses_some() -> None:
    model, batch = Checkpointed(), torch.randn(ROWS, 5)
    assert kept(model, 5) == ROWS * (5 + 7 + 7) * FLOAT + LOSS
    assert hook_alone(lambda: model(batch).sum(), model) == ROWS * (5 + 7) * FLOAT


class Hiding(torch.autograd.Function):
    """x -> x², with 2 x held as an attribute of ctx, where no hook sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.hidden = 2 * x
        return x.square()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        hidden: Tensor = ctx.hidden
        return gradients[0] * hidden


class Squaring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)

    def forward(self, batch: Tensor) -> Tensor:
        out: Tensor = Hiding.apply(self.first(batch))
        return out


def test_a_tensor_hidden_in_an_attribute_is_counted_where_a_hook_alone_misses_it() -> None:
    model, batch = Squaring(), torch.randn(ROWS, 5)
    assert kept(model, 5) == ROWS * (5 + 7) * FLOAT + LOSS
    assert hook_alone(lambda: model(batch).sum(), model) == ROWS * 5 * FLOAT


class Leaking(nn.Module):
    def __init__(self, leaked: list[Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.leaked = nn.Linear(5, 7), nn.Linear(7, 3), leaked

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.first(batch).relu()
        self.leaked.append(hidden.detach())
        out: Tensor = self.last(hidden)
        return out


def after_backward(model: nn.Module) -> StorageMeter:
    batch = torch.randn(ROWS, 5)
    with StorageMeter(excluded=model.parameters()) as meter:
        model(batch).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
        del batch
    return meter


@pytest.mark.parametrize("model", [nn.Sequential(linear(5, 7), GELU(), linear(7, 3)), Checkpointed(), Squaring()])
def test_nothing_is_left_after_the_backward_pass(model: nn.Module) -> None:
    meter = after_backward(model)
    assert meter.bytes == 0
    assert meter.peak > ROWS * (5 + 7) * FLOAT


def test_a_planted_leak_is_found_after_the_backward_pass() -> None:
    leaked: list[Tensor] = []
    meter = after_backward(Leaking(leaked))
    assert meter.bytes == leaked[0].nbytes == ROWS * 7 * FLOAT
    leaked.clear()
    assert meter.bytes == 0


def test_views_count_once_and_what_is_dropped_counts_in_the_peak_only() -> None:
    with StorageMeter() as meter:
        one = torch.ones(100)
        view = one[10:20].reshape(2, 5)
        held = meter.bytes
        del one
        still = meter.bytes
        del view
    assert (held, still, meter.bytes, meter.peak) == (400, 400, 0, 400)


def test_the_peak_is_the_largest_sum_held_at_one_time() -> None:
    with StorageMeter() as meter:
        first = torch.ones(100)
        second = torch.ones(50)
        del first
        third = torch.ones(75)
    assert (meter.peak, meter.bytes) == (600, 500)
    del second, third


def test_results_and_gradients_are_those_without_the_meter() -> None:
    model, batch = nn.Sequential(linear(5, 7), GELU(), linear(7, 3)), torch.randn(ROWS, 5)
    plain = torch.autograd.grad(model(batch).square().sum(), list(model.parameters()))
    with StorageMeter(excluded=model.parameters()):
        loss = model(batch).square().sum()
    metered = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(plain, metered, strict=True))


def test_the_meter_stops_with_the_block_even_on_a_fault() -> None:
    with pytest.raises(ValueError, match="planted"), StorageMeter() as meter:
        raise ValueError("planted")
    made = torch.ones(10)
    assert meter.bytes == 0
    del made


def test_the_process_peak_sees_an_allocation_and_a_reset_forgets_it() -> None:
    megabytes = 2**20
    gc.collect()
    reset_peak_rss()
    before = peak_rss()
    block = torch.ones(200 * megabytes, dtype=torch.uint8)
    with_block = peak_rss()
    del block
    remembered = peak_rss()
    reset_peak_rss()
    assert 190 * megabytes < with_block - before < 260 * megabytes
    assert remembered - before > 190 * megabytes
    assert peak_rss() - before < 50 * megabytes
