from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtune.memory import StorageMeter
from fedtune.techniques.fused_loss._chunked_loss import fused_cross_entropy

WIDE, HIGH, TOKENS = 8, 11, 13
"""Hidden width, words, and tokens: no chunk but 1 and 13 divides them."""


def a_head(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [n, h], W [v, h], b [v] and labels [n], three of which do not count."""
    random = torch.Generator().manual_seed(seed)
    shapes = ((TOKENS, WIDE), (HIGH, WIDE), (HIGH,))
    hidden, weight, bias = (torch.randn(s, generator=random).to(dtype).requires_grad_() for s in shapes)
    labels = torch.randint(0, HIGH, (TOKENS,), generator=random)
    labels[[0, 6, 12]] = -100
    return hidden, weight, bias, labels


def fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk: int = 5) -> Tensor:
    return fused_cross_entropy(hidden, weight, bias, labels, chunk_size=chunk, ignore_index=-100, num_items=None)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


@pytest.mark.parametrize("chunk", [1, 3, 5, 13, 64])
def test_loss_and_gradients_are_those_of_the_whole_for_any_chunk(chunk: int) -> None:
    hidden, weight, bias, labels = a_head()
    loss, wanted = fused(hidden, weight, bias, labels, chunk), F.cross_entropy(hidden @ weight.T + bias, labels)
    assert close(loss, wanted)
    found = torch.autograd.grad(loss, (hidden, weight, bias))
    for one, other in zip(found, torch.autograd.grad(wanted, (hidden, weight, bias)), strict=True):
        assert close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [1e4, -1e4, 300.0, -300.0])
def test_logits_far_from_zero_neither_overflow_nor_vanish(shift: float, dtype: torch.dtype) -> None:
    """All of a token's logits moved alike change neither its loss nor its gradients, of which exp(z) knows nothing."""
    hidden, weight, bias, labels = a_head(dtype)
    far = (bias + shift).detach().requires_grad_()
    loss, wanted = fused(hidden, weight, far, labels), F.cross_entropy(hidden @ weight.T + far, labels)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert close(loss, wanted, tolerance)
    found = torch.autograd.grad(loss, (hidden, weight, far))
    for one, other in zip(found, torch.autograd.grad(wanted, (hidden, weight, far)), strict=True):
        assert close(one, other, tolerance)


def test_one_logit_far_above_the_others_is_a_loss_of_their_distance() -> None:
    weight = torch.eye(3, dtype=torch.float64) * 2000
    hidden, labels = torch.eye(3, dtype=torch.float64).requires_grad_(), torch.tensor([0, 0, 0])
    assert fused(hidden, weight, None, labels).item() == pytest.approx(2 * 2000 / 3)


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_hold_against_finite_differences(with_bias: bool) -> None:
    hidden, weight, bias, labels = a_head()
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    run = partial(fused, labels=labels) if with_bias else partial(fused, bias=None, labels=labels)
    assert torch.autograd.gradcheck(run, inputs)


def test_only_what_is_trained_gets_a_gradient_and_keeps_one() -> None:
    hidden, weight, bias, labels = a_head()
    loss = fused(hidden, weight.detach(), bias.detach(), labels)
    node: Any = loss.grad_fn
    assert [None if tensor is None else tensor.shape for tensor in node.saved_tensors] == [hidden.shape, None, None]


def test_without_a_label_that_counts_loss_and_gradients_are_zero() -> None:
    hidden, weight, bias, labels = a_head()
    loss = fused(hidden, weight, bias, torch.full_like(labels, -100))
    assert loss == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_one_label_that_counts_moves_its_own_token_alone() -> None:
    hidden, weight, bias, labels = a_head()
    one = torch.full_like(labels, -100)
    one[7] = labels[7]
    loss = fused(hidden, weight, bias, one)
    assert close(loss, F.cross_entropy(hidden[7:8] @ weight.T + bias, labels[7:8]))
    [gradient] = torch.autograd.grad(loss, hidden)
    assert gradient.any(1).nonzero().tolist() == [[7]]


def test_the_upstream_gradient_scales_all_gradients() -> None:
    hidden, weight, bias, labels = a_head()
    once = torch.autograd.grad(fused(hidden, weight, bias, labels), (hidden, weight, bias))
    thrice = torch.autograd.grad(3 * fused(hidden, weight, bias, labels), (hidden, weight, bias))
    assert all(close(many, 3 * one) for one, many in zip(once, thrice, strict=True))


def test_a_given_divisor_takes_the_place_of_the_number_of_labels() -> None:
    hidden, weight, bias, labels = a_head()
    given = fused_cross_entropy(
        hidden, weight, bias, labels, chunk_size=5, ignore_index=-100, num_items=torch.tensor(4.0, dtype=torch.float64)
    )
    assert close(given, fused(hidden, weight, bias, labels) * 10 / 4)


def test_in_bf16_sums_are_as_fine_as_those_of_the_plain_step() -> None:
    """Against fp64 on the same rounded numbers, over a thousand tokens, whose gradients by W add up."""
    random = torch.Generator().manual_seed(2)
    coarse = [torch.randn(shape, generator=random).bfloat16().requires_grad_() for shape in ((1000, 16), (40, 16))]
    labels = torch.randint(0, 40, (1000,), generator=random)
    exact = [tensor.detach().double().requires_grad_() for tensor in coarse]
    wanted = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, labels), exact)
    loss = fused(coarse[0], coarse[1], None, labels, chunk=32)
    assert loss.dtype == torch.float32
    found = torch.autograd.grad(loss, coarse)
    usual = torch.autograd.grad(plain(coarse[0], coarse[1], None, labels), coarse)
    for one, other, truth in zip(found, usual, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - truth).norm() < 1.05 * (other - truth).norm()


@pytest.mark.parametrize("trained", [False, True])
def test_kept_and_peak_bytes_stay_below_the_closed_form(trained: bool) -> None:
    n, h, v, chunk = 512, 16, 900, 32
    random = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, h, generator=random, requires_grad=True)
    weight = torch.randn(v, h, generator=random, requires_grad=trained)
    labels = torch.randint(0, v, (n,), generator=random)
    gradients_alone = 4 * (n * h + trained * v * h)
    with StorageMeter(excluded=[hidden, weight, labels]) as meter:
        loss = fused(hidden, weight, None, labels, chunk)
        kept = meter.current_bytes
        loss.backward()
    small = 64 * n  # indices, labels and scalars
    assert gradients_alone <= kept <= gradients_alone + small
    assert meter.peak_bytes <= gradients_alone + 4 * chunk * v + small
    assert 4 * chunk * v < 4 * n * v / 10
