"""Check an attack on tiny deltas and labels."""

from collections.abc import Iterator

import torch

from fedtune.attacks import Attack, AttackedTensor
from fedtune.library.check_result import CheckResult, require, run_check
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit

__all__ = ["check_attack"]

_SHAPES = ((6, 5), (5,), (), (4, 3, 2, 2))


def check_attack(name: str) -> Iterator[CheckResult]:
    """Check what an attack sends, and the classes that it trains on."""
    attack: Attack = build_unit("fedtune.attacks", Unit(name=name), "attack")
    for shape in _SHAPES:
        what = f"changes a delta of shape {list(shape)}"
        yield run_check(what, lambda shape=shape: _check_delta(attack, shape))  # type: ignore[misc]
    yield run_check("trains on classes of the task", lambda: _check_labels(attack))


def _check_delta(attack: Attack, shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    allied = [torch.randn(shape, generator=random) for _ in range(3)]
    before = [one.clone() for one in allied]
    first, second = (attack.change_delta(AttackedTensor(allied[0], allied, 9, seed=7)) for _ in range(2))
    require(first.shape == allied[0].shape, f"the shape becomes {list(first.shape)}")
    require(first.dtype == torch.float32, f"the delta is {first.dtype}, but must be float32")
    require(bool(first.isfinite().all()), "the delta is not finite")
    require(torch.equal(first, second), "the same seed gives another delta")
    require(all(map(torch.equal, allied, before)), "the attack changes its inputs")


def _check_labels(attack: Attack) -> None:
    labels = torch.tensor([0, 3, 1, 2])
    changed = attack.change_labels(labels.clone(), 4)
    require(changed.shape == labels.shape, f"the labels have the shape {list(changed.shape)}")
    require(bool(((changed >= 0) & (changed < 4)).all()), "a label is none of the classes")
    require(attack.changes_labels or torch.equal(changed, labels), "changes_labels is not set, but labels change")
