"""Batches cut for want of memory: the same mean, the same gradients, and how small a device must cut them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedtune.device import memory_budget
from fedtune.device.memory_budget import MemoryEstimate, choose_micro_batch_size, estimate_memory
from fedtune.errors import MemoryBudgetError
from fedtune.recipe.schema import Train
from fedtune.tasks import get_task
from fedtune.training import (
    ClientRound,
    RunContext,
    clear_run_context,
    get_model_state,
    get_run_context,
    train_local_model,
)
from fedtune.training.micro_batches import compute_loss_weights, split_into_micro_batches
from fedtune.training.optimisers import BitsandbytesOptimiser, make_optimiser
from tests.federations import trivial, words


def test_the_mean_over_tokens_is_that_of_the_parts_by_their_shares() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 12, 5, generator=random, dtype=torch.float64)
    labels = torch.randint(5, (7, 12), generator=random)
    for row, length in enumerate((12, 1, 3, 7, 2, 9, 5)):
        labels[row, length:] = -100

    def loss(rows: list[int]) -> torch.Tensor:
        return F.cross_entropy(logits[rows, :-1].flatten(0, 1), labels[rows, 1:].flatten())

    parts = split_into_micro_batches(range(7), 3)
    assert parts == [[0, 1, 2], [3, 4, 5], [6]]
    weights = compute_loss_weights(get_task("text-generation"), [{"labels": labels[rows]} for rows in parts])
    found = sum(weight * loss(rows) for weight, rows in zip(weights, parts, strict=True))
    torch.testing.assert_close(found, loss(list(range(7))), rtol=1e-12, atol=0)


def test_a_client_s_round_in_micro_batches_is_its_round(tmp_path: Path) -> None:
    recipe = words(
        tmp_path, "train.techniques=full", "train.optimiser=sgd", "train.max_grad_norm=0.1", "train.batch_size=8"
    )
    whole, parts = (_delta(_shop(recipe.model_dump_json()), micro) for micro in (None, 3))
    assert any(not torch.equal(whole[name], parts[name]) for name in whole)
    for name, delta in whole.items():
        torch.testing.assert_close(parts[name], delta, rtol=1e-3, atol=1e-7)


def _shop(recipe: str) -> RunContext:
    clear_run_context()
    shop = get_run_context(recipe)
    clear_run_context()
    for module in shop.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return shop


def _delta(shop: RunContext, micro: int | None) -> dict[str, torch.Tensor]:
    state = get_model_state(shop.model, shop.shared_names)
    client = ClientRound(
        shop.model, shop.techniques, shop.recipe, shop.train, shop.client_rows[0], 1, 0, micro_batch_size=micro
    )
    return train_local_model(client, state).delta


@pytest.mark.parametrize(
    ("allowed", "halvings", "size"),
    [(200, 0, None), (199, 0, 5), (150, 0, 5), (149, 0, 2), (115, 0, 1), (200, 1, 5), (200, 9, 1)],
)
def test_a_batch_is_halved_until_it_fits(
    monkeypatch: pytest.MonkeyPatch, allowed: int, halvings: int, size: int | None
) -> None:
    monkeypatch.setattr(memory_budget, "estimate_memory", lambda *_: MemoryEstimate(100, 10))
    shop = _shop(trivial().model_dump_json())
    assert choose_micro_batch_size(shop, np.arange(50), 1, allowed, halvings) == size


def test_where_one_example_is_too_many_the_device_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "estimate_memory", lambda *_: MemoryEstimate(100e6, 10e6))
    shop = _shop(trivial().model_dump_json())
    with pytest.raises(MemoryBudgetError, match=r"needs about 110 MB of memory, even one example at a time, .* 109 MB"):
        choose_micro_batch_size(shop, np.arange(50), 1, 109_000_000)


def test_norms_that_follow_the_batch_keep_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_budget, "estimate_memory", lambda *_: MemoryEstimate(100e6, 10e6))
    monkeypatch.setattr(memory_budget, "can_split_batch", lambda *_: False)
    shop = _shop(trivial().model_dump_json())
    with pytest.raises(MemoryBudgetError, match="needs about 200 MB of memory, as its batch norms need whole batches"):
        choose_micro_batch_size(shop, np.arange(50), 1, 150_000_000)


def held_by(optimiser: object) -> int:
    """Bytes of all tensors an optimiser keeps between steps, but for counters."""
    found: list[torch.Tensor] = []

    def look(value: object) -> None:
        if isinstance(value, torch.Tensor):
            found.append(value)
        for child in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            look(child)

    state = optimiser.optimiser.state if isinstance(optimiser, BitsandbytesOptimiser) else vars(optimiser)
    for name, value in state.items():
        if name not in ("_parameters", "_settings"):
            look(value)
    return sum(tensor.untyped_storage().nbytes() for tensor in found if tensor.numel() > 1)


@pytest.mark.parametrize(
    "settings",
    [{"optimiser": "sgd"}, {"optimiser": "sgd", "momentum": 0.9}, {"optimiser": "adamw"}, {"optimiser": "adamw_8bit"}],
)
def test_the_budget_counts_what_a_round_holds_for_each_trained_value(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """While it trains the gradient and what the optimiser keeps, then delta and payload; and half a value more."""
    train = Train.model_validate({"local_steps": 1, **settings})
    weight = torch.nn.Parameter(torch.ones(256, 1024))
    weight.grad = torch.ones_like(weight)
    optimiser = make_optimiser(train, [weight])
    optimiser.step(0.1)
    per_value = max(1 + held_by(optimiser) / (4 * weight.numel()), 2) + 0.5
    shop = _shop(trivial().model_dump_json())
    shop.recipe = shop.recipe.model_copy(update={"train": train})
    monkeypatch.setattr(memory_budget, "_kept", lambda _, __, chosen, ___: 1000 * len(chosen))
    monkeypatch.setattr("psutil.Process.memory_info", lambda _: SimpleNamespace(rss=5_000))
    trained = sum(parameter.numel() for parameter in shop.model.parameters())
    found = estimate_memory(shop, np.arange(20), 1)
    assert found.bytes_per_example == 1000
    assert found.fixed_bytes == pytest.approx(5_000 + 4 * trained * per_value, rel=0.01)
    assert trained == 7850
    shop.model.bfloat16()
    assert estimate_memory(shop, np.arange(20), 1).fixed_bytes - found.fixed_bytes == 4 * trained, (
        "and an fp32 master of each"
    )


def test_the_budget_counts_fp32_masters_of_what_is_trained_in_a_lower_precision() -> None:
    layer = torch.nn.Linear(2, 3)
    assert memory_budget._mastered(layer) == 0
    assert memory_budget._mastered(layer.bfloat16()) == 2 * 3 + 3
    layer.bias.requires_grad_(False)
    assert memory_budget._mastered(layer) == 2 * 3
