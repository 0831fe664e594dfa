"""InfLoRA's arithmetic on Gram matrices, and O-LoRA's overlap of row spaces."""

import math

import pytest
import torch
from torch import Tensor

from fedtune.techniques.low_rank._input_subspace import design_projection, extend_subspace, schedule_energy_share
from fedtune.techniques.low_rank._pair_overlap import compute_overlap

NOTHING = torch.zeros(12, 0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    torch.manual_seed(0)


def draw_inputs(seed: int, rank: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, rank).diag()
    left, right = torch.randn(80, rank, generator=generator), torch.randn(rank, 12, generator=generator)
    return left @ scales @ right


def gram(x: Tensor) -> Tensor:
    return x.T @ x


def test_first_projection_is_the_principal_directions() -> None:
    x = draw_inputs(1)
    found = design_projection(gram(x), NOTHING, 3)
    right = torch.linalg.svd(x.double()).Vh[:3].float()
    assert torch.allclose((found * math.sqrt(3) @ right.T).abs(), torch.eye(3), atol=1e-4)


def test_projection_is_orthogonal_to_the_old_subspace_and_to_old_inputs() -> None:
    """An old input of the subspace passes A_t as zero, so whatever B_t becomes, its output stays."""
    old = extend_subspace(gram(draw_inputs(1, 4)), NOTHING, 1.0)
    assert old.shape == (12, 4)
    found = design_projection(gram(draw_inputs(2)), old, 4)
    assert (found.double() @ old).abs().max() < 1e-5
    assert (found @ draw_inputs(1, 4).T).abs().max() < 1e-5
    assert torch.allclose(3 * found @ found.T, torch.eye(4), atol=1e-5)


def test_projection_takes_the_strongest_of_what_is_left() -> None:
    """Twin: singular vectors of the projected inputs themselves."""
    old = extend_subspace(gram(draw_inputs(1)), NOTHING, 0.9)
    x = draw_inputs(2).double()
    left_over = x - x @ old @ old.T
    right = torch.linalg.svd(left_over).Vh[:2]
    found = design_projection(gram(x), old, 2).double() * math.sqrt(3)
    assert torch.allclose((found @ right.T).abs(), torch.eye(2, dtype=torch.float64), atol=1e-4)


def test_grams_of_clients_add_up() -> None:
    x = draw_inputs(3)
    summed = gram(x[:10].double()) + gram(x[10:55].double()) + gram(x[55:].double())
    assert torch.allclose(design_projection(summed, NOTHING, 3), design_projection(gram(x.double()), NOTHING, 3))


def test_subspace_holds_its_share_of_energy_with_no_direction_too_many() -> None:
    x = draw_inputs(4).double()
    for share in (0.5, 0.9, 0.99):
        found = extend_subspace(gram(x), NOTHING, share)
        assert (x @ found).square().sum() >= share * x.square().sum()
        assert (x @ found[:, :-1]).square().sum() < share * x.square().sum()
        assert torch.allclose(found.T @ found, torch.eye(found.shape[1], dtype=torch.float64))


def test_subspace_keeps_what_it_had_and_adds_only_what_is_missing() -> None:
    first = extend_subspace(gram(draw_inputs(1, 3)), NOTHING, 1.0)
    both = extend_subspace(gram(draw_inputs(2, 2)), first, 1.0)
    assert torch.equal(both[:, :3], first)
    assert both.shape == (12, 5)
    assert torch.equal(extend_subspace(gram(draw_inputs(1, 3)), both, 0.95), both)


def test_full_subspace_leaves_zero_rows() -> None:
    full = torch.eye(12)[:, :11]
    found = design_projection(torch.eye(12), full, 3)
    assert found[0].abs().max() > 0.5
    assert not found[1:].any()
    assert not design_projection(torch.zeros(12, 12), NOTHING, 2).any()
    assert extend_subspace(torch.zeros(12, 12), NOTHING, 0.9).shape == (12, 0)


def test_mean_of_b_is_the_mean_of_products() -> None:
    """A is common and fixed, so averaging B by examples averages the products exactly."""
    a = design_projection(gram(draw_inputs(1)), NOTHING, 4).double()
    factors, weights = torch.randn(3, 7, 4, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    products = sum(w * (b @ a) for w, b in zip(weights, factors, strict=True))
    assert torch.allclose((weights[:, None, None] * factors).sum(0) @ a, products)


def test_energy_share_grows_from_task_to_task() -> None:
    assert schedule_energy_share(0.95, 1.0, 0, 5) == pytest.approx(0.95)
    assert schedule_energy_share(0.95, 1.0, 4, 5) == pytest.approx(0.99)


def test_overlap_is_zero_for_orthogonal_rows_and_counts_entries() -> None:
    eye = torch.eye(6)
    assert compute_overlap(eye[:2], [eye[2:4], eye[4:]]) == 0
    assert compute_overlap(eye[:2], []) == 0
    one, other, now = torch.randn(3, 2, 6).unbind()
    wanted = sum(abs(float(a @ b)) for old in (one, other) for a in old for b in now)
    assert compute_overlap(now, [one, other]).item() == pytest.approx(wanted, rel=1e-5)


def test_overlap_moves_only_the_new_factor() -> None:
    old, now = torch.randn(2, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True)
    compute_overlap(now, [old]).backward()
    assert old.grad is None
    assert now.grad is not None
    assert torch.allclose(now.grad, (old @ now.T).sign().T @ old)
