import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtune.techniques.deft._activation_density import (
    compute_density,
    count_nonzero_per_token,
    estimate_activation_scale,
    sample_magnitudes,
)


def _density(a: Tensor, eps: float, counted: Tensor | None = None) -> Tensor:
    return compute_density(a, eps, counted)[1]


def test_the_density_is_the_mean_of_s_written_out_by_hand() -> None:
    a = torch.tensor([[[1.0, 0.0, 2.0], [0.0, 0.5, 0.0]], [[-1.0, 3.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    by_hand = (1 / 1.25 + 4 / 4.25 + 0.25 / 0.5 + 1 / 1.25 + 9 / 9.25) / 12
    assert float(_density(a, 0.25)) == pytest.approx(by_hand, rel=1e-12)


def test_the_density_is_zero_for_zeros_and_at_most_one() -> None:
    assert float(_density(torch.zeros(3, 7), 1e-7)) == 0.0
    assert float(_density(torch.full((3, 7), -0.0), 1e-7)) == 0.0
    assert float(_density(torch.full((3, 7), 1e6), 1e-7)) == 1.0
    assert 0 < float(_density(torch.randn(3, 7), 0.1)) < 1


def test_the_density_tends_to_the_exact_share_as_eps_falls() -> None:
    a = torch.randn(50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).relu()
    a[(a > 0) & (a < 1e-3)] = 1e-3
    exact = int(count_nonzero_per_token(a).sum()) / a.numel()
    errors = [abs(float(_density(a, eps)) - exact) for eps in (1e-2, 1e-4, 1e-8, 1e-12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


def test_the_gradient_is_that_of_the_formula_and_pushes_every_activation_towards_zero() -> None:
    a = torch.randn(4, 5, 6, dtype=torch.float64).requires_grad_()
    _density(a, 0.3).backward()
    assert a.grad is not None
    wanted = 2 * a.detach() * 0.3 / (a.detach() ** 2 + 0.3) ** 2 / a.numel()
    torch.testing.assert_close(a.grad, wanted, rtol=1e-12, atol=0)
    assert bool((a.grad.sign() == a.detach().sign()).all())


def test_gradcheck_with_padding_and_both_outputs_used() -> None:
    a = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    counted = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda a: compute_density(a, 0.3, counted), (a,))


@pytest.mark.parametrize("activation", [F.gelu, F.silu, torch.tanh])
def test_the_gradient_is_the_same_when_the_activation_is_made_again(activation: object) -> None:
    assert callable(activation)
    x = torch.randn(4, 6, dtype=torch.float64).requires_grad_()
    through, direct = (torch.randn(4, 6, dtype=torch.float64) for _ in "ab")
    a = activation(x)
    out, density = compute_density(a, 0.3, None, activation, (x.detach(),))
    ((out * through).sum() + 2 * density + (x * direct).sum()).backward()
    found = x.grad
    x.grad = None
    a = activation(x)
    ((a * through).sum() + 2 * (a**2 / (a**2 + 0.3)).mean() + (x * direct).sum()).backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-10, atol=1e-12)


def test_long_inputs_are_handled_in_parts_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(33, 10).requires_grad_()
    whole = _density(a, 0.1)
    [wanted] = torch.autograd.grad(whole, a)
    monkeypatch.setattr("fedtune.techniques.deft._activation_density._PART", 64)
    parts = _density(a, 0.1)
    [found] = torch.autograd.grad(parts, a)
    torch.testing.assert_close(parts, whole)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("eps", [1e-7, 1e-12])
def test_half_precision_neither_underflows_nor_divides_by_zero(eps: float) -> None:
    a = torch.tensor([[0.0, 1e-4, -1e-4, 1.0]], dtype=torch.bfloat16).requires_grad_()
    density = _density(a, eps)
    density.backward()
    wide = a.detach().float()
    assert density.dtype == torch.float32
    assert float(density.detach()) == pytest.approx(float((wide**2 / (wide**2 + eps)).mean()), rel=1e-5)
    assert a.grad is not None
    assert a.grad.dtype == torch.bfloat16
    assert bool(torch.isfinite(a.grad).all())


def test_padding_neither_counts_nor_is_pushed() -> None:
    a = torch.randn(4, 6).requires_grad_()
    counted = torch.tensor([True, False, True, False])
    density = _density(a, 0.3, counted)
    density.backward()
    assert float(density.detach()) == pytest.approx(float(_density(a[counted].detach(), 0.3)))
    assert a.grad is not None
    assert not a.grad[~counted].any()
    assert bool(a.grad[counted].all())


def test_an_inactive_relu_unit_is_not_pushed_and_an_active_one_is_pushed_down() -> None:
    x = torch.tensor([[-1.0, -1e-4, 1e-4, 1.0]]).requires_grad_()
    _density(x.relu(), 1e-7).backward()
    assert x.grad is not None
    assert x.grad[0, :2].tolist() == [0.0, 0.0]
    assert bool((x.grad[0, 2:] > 0).all())


def test_gelu_is_pushed_down_beyond_its_minimum_and_towards_zero_before_it() -> None:
    x = torch.tensor([[-3.0, -0.3, 0.3]]).requires_grad_()
    _density(F.gelu(x), 1e-2).backward()
    assert x.grad is not None
    assert x.grad.sign().tolist() == [[1.0, -1.0, 1.0]]


def test_the_incoming_gradient_is_left_alone() -> None:
    a, given = torch.randn(4, 6).requires_grad_(), torch.ones(4, 6)
    out, density = compute_density(a, 0.3, None)
    torch.autograd.backward([out, density], [given, torch.tensor(1.0)])
    assert bool((given == 1).all())


def test_minus_zero_is_zero_in_the_exact_count() -> None:
    assert count_nonzero_per_token(torch.tensor([[-0.0, 0.0, 1e-30], [1.0, -1.0, -0.0]])).tolist() == [1, 2]
    assert count_nonzero_per_token(F.gelu(torch.tensor([[-6.0, -5.0]]))).tolist() == [1]


def test_the_scale_follows_the_product_and_ignores_outliers_and_padding() -> None:
    product = torch.randn(30, 50, generator=torch.Generator().manual_seed(1))
    counted = torch.arange(30) < 20
    product[~counted] = 1e6
    wanted = estimate_activation_scale(product[:20], None)
    assert estimate_activation_scale(product, counted) == pytest.approx(wanted)
    assert estimate_activation_scale(0.1 * product, counted) == pytest.approx(0.1 * wanted, rel=1e-5)
    product[3, 4] = 1e6
    assert estimate_activation_scale(product, counted) == pytest.approx(wanted, rel=0.05)
    assert 0.9 < wanted < 1.05


def test_a_sample_of_magnitudes_has_the_distribution_of_the_whole() -> None:
    product = torch.randn(2000, 700, generator=torch.Generator().manual_seed(2))
    sample = sample_magnitudes(product, None, 8192)
    assert 4096 <= len(sample) <= 2 * 8192
    assert float(sample.median()) == pytest.approx(float(product.abs().median()), rel=0.05)
