import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fedtune.tasks import Task, get_task
from fedtune.training import EvaluatedModel, Metric, evaluate_model
from tests.tiny import VOCABULARY, FewTexts, bert, few_texts, llama

TEXT = get_task("text-classification")
LANGUAGE = get_task("text-generation")


def figures(scores: list[Metric]) -> dict[tuple[str, str], float]:
    found = {(item.domain, item.name): item.value for item in scores}
    assert len(found) == len(scores)
    return found


def slow_scores(model: PreTrainedModel, data: FewTexts) -> dict[tuple[str, str], float]:
    """One text at a time, without padding; for a language model one token at a time."""
    model.eval()
    tallies: dict[str, list[tuple[float, bool]]] = {"all": [], "film": [], "book": []}
    for index, row in enumerate(data.rows):
        logits = model(input_ids=torch.tensor([row])).logits[0].detach().double()
        if data.labels is None:
            pairs = [(logits[place], row[place + 1]) for place in range(len(row) - 1)]
        else:
            pairs = [(logits, int(data.labels[index]))]
        for scores, wanted in pairs:
            loss = float(scores.exp().sum().log() - scores[wanted])
            for domain in ("all", (data.domains or [])[index]):
                tallies[domain].append((loss, int(scores.argmax()) == wanted))
    found: dict[tuple[str, str], float] = {}
    for domain, tally in tallies.items():
        found[domain, "loss"] = sum(loss for loss, _ in tally) / len(tally)
        found[domain, "accuracy"] = sum(right for _, right in tally) / len(tally)
        if data.labels is None:
            found[domain, "perplexity"] = math.exp(found[domain, "loss"])
    found["mean", "accuracy"] = (found["film", "accuracy"] + found["book", "accuracy"]) / 2
    return found


@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("task", [TEXT, LANGUAGE])
def test_scores_equal_those_of_a_slow_twin(task: Task, lengths: bool, batch: int) -> None:
    data = few_texts(language=task == LANGUAGE, lengths=lengths)
    model = llama(seed=4, initializer_range=0.5) if task == LANGUAGE else bert(seed=2, initializer_range=0.5)
    found, wanted = figures(evaluate_model(EvaluatedModel(model, task, batch), data)), slow_scores(model, data)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-12), key
    assert 0 < wanted["all", "accuracy"] < 1
    assert wanted["film", "loss"] != wanted["book", "loss"]


def test_without_domains_only_the_whole_is_scored() -> None:
    found = figures(evaluate_model(EvaluatedModel(bert(), TEXT, 4), few_texts(domains=False)))
    assert found.keys() == {("all", "accuracy"), ("all", "loss")}


def test_the_scores_of_a_batch_do_not_depend_on_dropout_or_make_gradients() -> None:
    model = bert().train()
    assert evaluate_model(EvaluatedModel(model, TEXT, 4), few_texts()) == evaluate_model(
        EvaluatedModel(model, TEXT, 4), few_texts()
    )
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_language_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    found = figures(evaluate_model(EvaluatedModel(model, LANGUAGE, 4), few_texts(language=True)))
    assert found["all", "perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert found["all", "loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)
