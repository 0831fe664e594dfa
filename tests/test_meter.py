from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fedtune.memory import StorageMeter

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
        found = meter.current_bytes
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
    with StorageMeter() as meter:
        loss = model(batch).sum()
        found = meter.current_bytes
    assert found == kept(model, 5) + 7 * 9 * FLOAT  # the first layer's weight is not kept: its input needs no gradient
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


LEAKED: list[Tensor] = []


class Leaking(nn.Module):
    """Two layers; what lies between them takes the hidden states and gives them back."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(5, 7), nn.Linear(7, 3), between

    def forward(self, batch: Tensor) -> Tensor:
        out: Tensor = self.last(self.between(self.first(batch)))
        return out


class HeldByCtx(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.held = 2 * x
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def into_a_list(hidden: Tensor) -> Tensor:
    LEAKED.append(2 * hidden.detach())
    return hidden


def into_a_closure(hidden: Tensor) -> Tensor:
    doubled = 2 * hidden.detach()
    hidden.register_hook(lambda gradient: gradient + 0 * doubled)
    return hidden


def into_ctx(hidden: Tensor) -> Tensor:
    out: Tensor = HeldByCtx.apply(hidden)
    return out


def as_it_is(hidden: Tensor, others: list[Tensor] | None = None) -> Tensor:
    return hidden.view_as(hidden)


def squared(hidden: Tensor, others: list[Tensor]) -> Tensor:
    return hidden.square()


def into_a_keyword(hidden: Tensor) -> Tensor:
    """The block keeps its input too, beside the output that the next layer keeps."""
    out: Tensor = checkpoint(squared, hidden, others=[2 * hidden.detach()], use_reentrant=False)
    return out


def into_reentrant_checkpointing(hidden: Tensor) -> Tensor:
    out: Tensor = checkpoint(as_it_is, hidden, [2 * hidden.detach()], use_reentrant=True)
    return out


@pytest.mark.parametrize(
    ("leak", "columns"),
    [
        (into_a_list, 7),
        (into_a_closure, 7),
        (into_ctx, 7),
        (into_a_keyword, 7 + 7),
        (into_reentrant_checkpointing, 7),
    ],
)
def test_a_planted_leak_is_found_to_the_byte_where_a_hook_alone_misses_it(
    leak: Callable[[Tensor], Tensor], columns: int
) -> None:
    leaking, batch = Leaking(leak), torch.randn(ROWS, 5)
    assert kept(Leaking(as_it_is), 5) == ROWS * (5 + 7) * FLOAT + LOSS
    assert kept(leaking, 5) == ROWS * (5 + 7 + columns) * FLOAT + LOSS
    assert hook_alone(lambda: leaking(batch).sum(), leaking) == ROWS * (5 + columns) * FLOAT
    LEAKED.clear()


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
    assert meter.current_bytes == 0
    assert meter.peak_bytes > ROWS * (5 + 7) * FLOAT


def test_what_outlives_the_step_is_found_after_the_backward_pass() -> None:
    meter = after_backward(Leaking(into_a_list))
    assert meter.current_bytes == LEAKED[0].nbytes == ROWS * 7 * FLOAT
    LEAKED.clear()
    assert meter.current_bytes == 0
