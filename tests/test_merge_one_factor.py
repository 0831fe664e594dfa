"""Merges of one factor of a product whose other factor is common: which of them are merges of the products."""

import pytest
import torch
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging import CombineStep
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.training.resolve import resolve_recipe
from tests.merge_examples import METHODS, a_step, merged, plain, thinning
from tests.recipe_examples import TEXT

ROWS, RANK, COLUMNS = 12, 4, 9
SUMS = ["mean", "linear", "task-arithmetic"]
PICKS = ["ties", "dare-ties", "della", "breadcrumbs", "breadcrumbs-ties", "sce", "magmax", "opcm"]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


B, A = [drawn(seed, ROWS, RANK) for seed in range(4)], drawn(9, RANK, COLUMNS)
WEIGHTS = [0.1, 0.2, 0.3, 0.4]
MIX = drawn(10, RANK, RANK)


def one(step: CombineStep, deltas: list[Tensor], draw: int = 0) -> Tensor:
    return merged(step, [{"x": delta} for delta in deltas], WEIGHTS, draw)["x"]


def refactored(step: CombineStep) -> Tensor:
    """The product of what is merged of B M, with M^-1 A."""
    right: Tensor = torch.linalg.inv(MIX) @ A
    return one(step, [b @ MIX for b in B]) @ right


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_of_one_factor_is_the_sum_of_the_products(name: str) -> None:
    step = thinning(name)
    products = one(step, [b @ A for b in B])
    torch.testing.assert_close(one(step, B) @ A, products, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(refactored(step), products, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dare-linear", "della-linear"])
def test_random_drops_of_one_factor_are_the_sum_of_the_products_in_the_mean(name: str) -> None:
    step, draws = a_step(name, {"density": 0.5}), 2000
    found = torch.stack([one(step, B, draw) @ A for draw in range(draws)])
    wanted = one(plain("task-arithmetic"), [b @ A for b in B])
    error = found.std(0) / draws**0.5
    assert bool(((found.mean(0) - wanted).abs() < 5 * error + 1e-6).all())


@pytest.mark.parametrize("name", PICKS)
def test_what_picks_entries_depends_on_how_equal_products_are_factored(name: str) -> None:
    step = thinning(name)
    products, factor = one(step, [b @ A for b in B]), one(step, B) @ A
    assert (factor - refactored(step)).norm() > 0.05 * factor.norm()
    assert (factor - products).norm() > 0.05 * products.norm()


def test_exactly_those_are_declared() -> None:
    assert sorted(name for name in METHODS if plain(name).selects_entries) == sorted(PICKS)


@pytest.mark.parametrize("exact", ["alternate", "freeze-a"])
@pytest.mark.parametrize("name", [*PICKS, *SUMS, "dare-linear", "trimmed-mean"])
def test_a_recipe_is_refused_where_entries_of_one_factor_would_be_picked(name: str, exact: str) -> None:
    recipe = parse_recipe(TEXT, "a", [f"train.techniques=[{{lora: {{exact: {exact}}}}}]", f"merge=[{name}]"])
    if name not in PICKS:
        resolve_recipe(recipe)
        return
    with pytest.raises(
        RecipeError, match=f"^merge: {name} depends on how a product is factored, but lora sends one factor"
    ):
        resolve_recipe(recipe)


def test_whole_weights_may_be_picked_from() -> None:
    resolve_recipe(parse_recipe(TEXT, "a", ["train.techniques=[full]", "merge=[ties]"]))
