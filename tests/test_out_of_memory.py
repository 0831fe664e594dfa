"""A full accelerator halves the micro-batch; the step's gradients and loss stay those of the whole batch."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtune import techniques
from fedtune.errors import FedtuneWarning, MemoryBudgetError
from fedtune.recipe.schema import Unit
from fedtune.tasks import get_task
from fedtune.training import (
    ClientRound,
    EvaluatedModel,
    LocalTrainingResult,
    evaluate_model,
    get_model_state,
    step_loss,
    train_local_model,
    training_step,
)
from tests.tiny import a_training_recipe, bert, few_texts

TEXT = get_task("text-classification")
ROWS = np.arange(8)


class _SmallCard:
    """Runs out of memory in the backward pass of every batch of more than ``most`` examples."""

    def __init__(self, most: int) -> None:
        self.most, self.sizes = most, list[int]()
        self._compute = step_loss.compute_step_loss

    def compute_loss(self, task: Any, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        size = len(batch["labels"])
        self.sizes.append(size)
        loss = self._compute(task, model, batch)
        if size > self.most:
            torch.rand(3)  # the step had drawn random numbers
            loss.backward()  # and some of the gradients were there
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss


def _train(micro: int | None = None) -> LocalTrainingResult:
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    chosen = techniques.build_techniques([Unit(name="full")])
    state = get_model_state(model, techniques.apply_techniques(chosen, model, TEXT, 0))
    recipe = a_training_recipe(batch_size=8, local_steps=2, optimiser="sgd", lr=0.1)
    return train_local_model(ClientRound(model, chosen, recipe, few_texts(), ROWS, 1, 1, {}, micro), state)


def test_a_step_that_does_not_fit_is_taken_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    small = _SmallCard(2)
    whole, by_two = _train(), _train(2)
    monkeypatch.setattr(training_step, "compute_step_loss", small.compute_loss)
    with pytest.warns(FedtuneWarning, match="ran out of memory") as warned:
        found = _train()
    assert [str(one.message).rpartition(" ")[2] for one in warned] == ["4", "2"]
    assert small.sizes == [8, 4, *[2] * 8]  # the size that fits is kept for the steps behind
    assert found.micro_batch_size == 2
    assert whole.micro_batch_size is None
    assert found.train_loss == pytest.approx(whole.train_loss, rel=1e-6)
    for name, delta in found.delta.items():
        assert torch.equal(delta, by_two.delta[name])  # nothing is left of the steps that failed
        torch.testing.assert_close(delta, whole.delta[name], rtol=1e-4, atol=1e-6)


def test_one_example_that_does_not_fit_ends_the_round_with_a_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "compute_step_loss", _SmallCard(0).compute_loss)
    with pytest.warns(FedtuneWarning), pytest.raises(MemoryBudgetError, match="even one example at a time") as error:
        _train()
    assert error.value.code == "memory-short"


def test_other_errors_of_a_step_are_not_taken_for_short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(training_step, "compute_step_loss", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        _train()


def test_scoring_that_does_not_fit_is_done_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bert()
    evaluated = EvaluatedModel(model, TEXT, 8)
    wanted = evaluate_model(evaluated, few_texts())
    plain, sizes = type(TEXT).score_batch, list[int]()

    def score(task: Any, given: nn.Module, batch: Mapping[str, Tensor], reader: Any) -> Any:
        sizes.append(len(batch["labels"]))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(task, given, batch, reader)

    monkeypatch.setattr(type(TEXT), "score_batch", score)
    found = evaluate_model(evaluated, few_texts())
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 4, 2, 2]
    assert [one[:2] for one in found] == [one[:2] for one in wanted]
    assert [one.value for one in found] == pytest.approx([one.value for one in wanted], rel=1e-5)
