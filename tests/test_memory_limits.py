"""A process under a hard limit: a request above it fails and is survived, and training halves its micro-batch."""

import multiprocessing
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fedtune import techniques
from fedtune.accelerator import is_out_of_memory
from fedtune.device.held_memory import count_held_bytes, read_held_bytes
from fedtune.device.limited_round import keep_within_budget
from fedtune.errors import FedtuneWarning, MemoryBudgetError
from fedtune.memory import fix_mmap_threshold, read_resident_memory
from fedtune.memory.limits import can_limit_memory, limit_private_memory
from fedtune.recipe.schema import Unit
from fedtune.tasks import get_task
from fedtune.training import ClientRound, LocalTrainingResult, get_model_state, train_local_model
from tests.tiny import a_training_recipe, bert, few_texts

LIMITED = pytest.mark.skipif(not can_limit_memory(), reason="this system limits no private memory")
MEGABYTES = 2**20
TEXT = get_task("text-classification")


@LIMITED
def test_a_request_above_the_limit_fails_and_the_next_one_below_it_passes() -> None:
    with limit_private_memory(100 * MEGABYTES):
        with pytest.raises(RuntimeError, match="can't allocate memory") as error:
            torch.ones(200 * MEGABYTES, dtype=torch.uint8)
        assert is_out_of_memory(error.value)
        with pytest.raises(MemoryError):
            bytearray(200 * MEGABYTES)
        assert torch.ones(50 * MEGABYTES, dtype=torch.uint8).max() == 1
        with limit_private_memory(10 << 30), pytest.raises(MemoryError):
            bytearray(200 * MEGABYTES)  # the lower limit holds
    assert torch.ones(200 * MEGABYTES, dtype=torch.uint8).numel()


@LIMITED
def test_a_round_that_needs_more_is_declined_with_the_mend() -> None:
    budget = read_held_bytes() + 50 * MEGABYTES
    sentence = r"needs more than the \d+ MB that this device allows; lower"
    with pytest.raises(MemoryBudgetError, match=sentence) as error, keep_within_budget(budget):
        torch.ones(200 * MEGABYTES, dtype=torch.uint8)
    assert (error.value.code, error.value.counts) == ("memory-training", {"allowed_mb": round(budget / 1e6)})
    with pytest.raises(RuntimeError, match="shapes"), keep_within_budget(budget):
        raise RuntimeError("shapes do not match")


def test_the_budget_counts_anonymous_memory_and_the_hot_pages_of_files() -> None:
    assert count_held_bytes(100, 30) == 130
    assert count_held_bytes(100, 10**9) == 100 + 64_000_000
    parts = read_resident_memory()
    if parts is not None:
        assert read_held_bytes() == pytest.approx(count_held_bytes(*parts), abs=30 * MEGABYTES)


def train(micro: int | None = None, room: int | None = None) -> LocalTrainingResult:
    """Train a step on eight texts, whose MLPs make 2 x 75 MB each. ``room`` is what it may take more than it holds."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, intermediate_size=1 << 18)
    chosen = techniques.build_techniques([Unit(name="bias")])
    state = get_model_state(model, techniques.apply_techniques(chosen, model, TEXT, 0))
    recipe = a_training_recipe(batch_size=8, local_steps=1, optimiser="sgd", lr=0.1)
    client = ClientRound(model, chosen, recipe, few_texts(), np.arange(8), 1, 1, {}, micro)
    with nullcontext() if room is None else keep_within_budget(read_held_bytes() + room):
        return train_local_model(client, state)


@LIMITED
def test_a_step_that_would_exceed_the_limit_is_taken_in_halves_and_one_that_cannot_is_declined() -> None:
    """In a process of its own, whose heap holds no blocks that other tests have freed."""
    process = multiprocessing.get_context("forkserver").Process(target=_train_in_halves)
    process.start()
    process.join()
    assert process.exitcode == 0


def _train_in_halves() -> None:
    fix_mmap_threshold()
    with pytest.warns(FedtuneWarning, match="ran out of memory"):
        found = train(room=220 * MEGABYTES)
    assert found.micro_batch_size in (4, 2, 1)
    smaller = train(found.micro_batch_size)
    assert all(torch.equal(delta, smaller.delta[name]) for name, delta in found.delta.items())
    with pytest.warns(FedtuneWarning), pytest.raises(MemoryBudgetError, match="even one example at a time") as error:
        train(room=1)
    assert error.value.code in ("memory-short", "memory-training")
