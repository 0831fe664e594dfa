import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fedtune import techniques
from fedtune.recipe import Optimiser, Recipe, Task, Train, Unit
from fedtune.seeds import derive
from fedtune.techniques import Technique
from fedtune.training import Outcome, Score, load_state, processor_threads, read_state, score, total_steps, train
from fedtune.training.loop import batches
from fedtune.training.optimiser import make_optimiser, rate
from tests.tiny import VOCABULARY, bert, llama

TEXT: Task = "sequence-classification"
LANGUAGE: Task = "causal-language-modelling"


@dataclass(frozen=True)
class FewTexts:
    """Twelve texts of 2 to 9 tokens in two domains, without the encoder."""

    rows: list[list[int]]
    labels: Tensor | None
    domains: list[str] | None
    lengths: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        chosen = [torch.tensor(self.rows[index]) for index in indices]
        ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        mask = (ids != 0).long()
        labels = ids.masked_fill(ids == 0, -100) if self.labels is None else self.labels[torch.tensor(indices)]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def few_texts(*, language: bool = False, domains: bool = True, lengths: bool = True) -> FewTexts:
    random = np.random.default_rng(4)
    rows = [random.integers(1, VOCABULARY, size=random.integers(2, 10)).tolist() for _ in range(12)]
    return FewTexts(
        rows=rows,
        labels=None if language else torch.tensor(random.integers(0, 3, size=12)),
        domains=["film" if row % 3 else "book" for row in range(12)] if domains else None,
        lengths=torch.tensor([len(row) for row in rows]) if lengths else None,
    )


def a_recipe(*, rounds: int = 2, **settings: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "example",
            "task": TEXT,
            "model": {"source": "path:nowhere"},
            "data": {"source": "sample:nothing"},
            "devices": [{"count": 2}],
            "train": {"batch": 4, **({"steps": 4} if "epochs" not in settings else {}), **settings},
            "federation": {"rounds": rounds},
        }
    )


def prepared(model: nn.Module, technique: str = "full") -> tuple[tuple[Technique, ...], dict[str, Tensor]]:
    """The techniques, applied, and the state they share."""
    chosen = techniques.choose([Unit(name=name) for name in technique.split("+")])
    return chosen, read_state(model, techniques.apply(chosen, model, TEXT, 0))


INDICES = np.array([0, 2, 3, 4, 5, 7, 8, 9, 10, 11])


def a_round(model: nn.Module, recipe: Recipe, number: int = 1, client: int = 1, technique: str = "full") -> Outcome:
    chosen, state = prepared(model, technique)
    return train(model, chosen, state, few_texts(), INDICES, recipe, number, client)


def readable_twin(model: PreTrainedModel, recipe: Recipe, number: int, client: int) -> tuple[dict[str, Tensor], float]:
    """What ``train`` promises, as one would write it for a notebook: deltas and the mean loss."""
    settings, data = recipe.train, few_texts()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    shuffling = np.random.default_rng(derive(recipe.seed, number, client, "order"))
    per_round = settings.steps or (settings.epochs or 0) * math.ceil(len(INDICES) / settings.batch)
    torch.manual_seed(derive(recipe.seed, number, client, "dropout"))
    model.train()
    losses: list[float] = []
    while len(losses) < per_round:
        order = shuffling.permutation(INDICES)
        for start in range(0, len(order), settings.batch):
            if len(losses) == per_round:
                break
            done = (per_round * (number - 1) + len(losses)) / (per_round * recipe.federation.rounds)
            if done < settings.warmup:
                factor = done / settings.warmup
            elif settings.schedule == "linear":
                factor = 1 - (done - settings.warmup) / (1 - settings.warmup)
            elif settings.schedule == "cosine":
                factor = (1 + math.cos(math.pi * (done - settings.warmup) / (1 - settings.warmup))) / 2
            else:
                factor = 1.0
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * factor
            optimiser.zero_grad()
            loss = model(**data.batch(order[start : start + settings.batch].tolist())).loss
            loss.backward()
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimiser.step()
            losses.append(loss.item())
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}, sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({}, 1),
        ({}, 2),
        ({"schedule": "constant"}, 2),
        ({"schedule": "cosine"}, 2),
        ({"schedule": "linear", "warmup": 0.25}, 1),
        ({"schedule": "cosine", "warmup": 0.5}, 2),
        ({"clip": 0.1}, 1),
        ({"clip": None}, 1),
        ({"weight_decay": 0.1, "lr": 3e-3}, 1),
        ({"epochs": 2, "schedule": "constant"}, 1),
        ({"steps": 8}, 2),
    ],
)
def test_a_round_equals_a_bare_loop_to_the_bit(settings: dict[str, Any], number: int) -> None:
    recipe = a_recipe(**settings)
    outcome = a_round(bert(), recipe, number)
    deltas, loss = readable_twin(bert(), recipe, number, client=1)
    assert outcome.delta.keys() == deltas.keys()
    assert all(torch.equal(outcome.delta[name], deltas[name]) for name in deltas)
    assert outcome.loss == pytest.approx(loss, abs=1e-12)
    assert any(delta.any() for delta in deltas.values())


@pytest.mark.parametrize(
    "settings", [{"clip": 0.1}, {"schedule": "constant"}, {"warmup": 0.25}, {"lr": 2e-3}, {"weight_decay": 0.1}]
)
def test_every_setting_the_bare_loop_is_compared_with_matters(settings: dict[str, Any]) -> None:
    plain, changed = a_round(bert(), a_recipe()), a_round(bert(), a_recipe(**settings))
    assert any(not torch.equal(plain.delta[name], changed.delta[name]) for name in plain.delta)


def same_bits(one: Outcome, other: Outcome) -> bool:
    return one.loss == other.loss and all(torch.equal(one.delta[name], other.delta[name]) for name in one.delta)


@pytest.mark.parametrize("technique", ["full", "lora", "bias+checkpointing"])
def test_a_round_gives_the_same_bits_whatever_ran_before(technique: str) -> None:
    model, recipe, data = bert(), a_recipe(), few_texts()
    chosen, state = prepared(model, technique)
    first = train(model, chosen, state, data, INDICES, recipe, 1, 0)
    train(model, chosen, state, data, np.array([1, 6]), recipe, 2, 1)
    score(model, data, 5, TEXT)
    torch.manual_seed(99)
    model(**data.batch([0, 1])).loss.backward()
    assert same_bits(first, train(model, chosen, state, data, INDICES, recipe, 1, 0))


def test_a_client_that_fails_midway_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = bert(), a_recipe()
    chosen, state = prepared(model)
    first = train(model, chosen, state, few_texts(), INDICES, recipe, 1, 0)
    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(model, chosen, state, few_texts(), INDICES, recipe, 1, 1)
    assert same_bits(first, train(model, chosen, state, few_texts(), INDICES, recipe, 1, 0))


def test_rounds_and_clients_draw_their_own_numbers() -> None:
    recipe = a_recipe(schedule="constant")
    outcomes = [a_round(bert(), recipe, number, client) for number, client in ((1, 0), (1, 1), (2, 0))]
    assert len({outcome.loss for outcome in outcomes}) == 3


def test_a_round_leaves_the_random_state_and_the_threads_of_the_process_alone() -> None:
    model, recipe = bert(), a_recipe(threads=2, steps=1)
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    a_round(model, recipe)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    with processor_threads(2):
        assert torch.get_num_threads() == 2


def test_only_what_is_trained_in_the_round_is_sent_and_the_rest_stays() -> None:
    model, recipe = bert(), a_recipe()
    chosen, state = prepared(model, "lora")
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in state}
    for number, factor in ((1, "B"), (2, "A")):
        outcome = train(model, chosen, state, few_texts(), INDICES, recipe, number, 0)
        head = {"classifier.weight", "classifier.bias"}
        assert outcome.delta.keys() == {name for name in state if f".lora_{factor}." in name} | head
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())


def test_the_outcome_counts_examples_with_repeats_and_ragged_batches() -> None:
    assert a_round(bert(), a_recipe(epochs=2)).examples == 20
    assert a_round(bert(), a_recipe(steps=4)).examples == 4 + 4 + 2 + 4
    outcome = a_round(bert(), a_recipe())
    assert outcome.seconds > 0
    assert outcome.peak_rss > 2**20


def test_saved_bytes_fall_with_techniques_that_keep_less() -> None:
    full, checkpointed, head = (
        a_round(bert(), a_recipe(), technique=name).saved_bytes for name in ("full", "full+checkpointing", "classifier")
    )
    assert head < checkpointed < full


def test_a_bfloat16_delta_is_relative_to_the_rounded_start() -> None:
    model = bert().to(torch.bfloat16)
    chosen, rounded = prepared(model)
    between = {name: tensor + 1e-5 for name, tensor in rounded.items()}
    still = train(model, chosen, between, few_texts(), INDICES, a_recipe(optimiser="sgd", lr=1e-30), 1, 0)
    assert all(not delta.any() for delta in still.delta.values())
    moved = train(model, chosen, between, few_texts(), INDICES, a_recipe(lr=1e-2), 1, 0)
    assert {delta.dtype for delta in moved.delta.values()} == {torch.float32}
    ends = read_state(model, moved.delta)
    load_state(model, between)
    starts = read_state(model, moved.delta)
    assert all(torch.equal(moved.delta[name], ends[name] - starts[name]) for name in ends)
    assert any(delta.any() for delta in moved.delta.values())


def test_the_state_is_a_copy_in_single_precision() -> None:
    model = bert().to(torch.bfloat16)
    state = read_state(model, ["classifier.weight"])
    state["classifier.weight"] += 1
    assert state["classifier.weight"].dtype == torch.float32
    assert not torch.equal(model.get_parameter("classifier.weight").float(), state["classifier.weight"])
    load_state(model, state)
    assert torch.equal(model.get_parameter("classifier.weight"), state["classifier.weight"].bfloat16())


class Normalised(nn.Module):
    """A layer with batch statistics, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(VOCABULARY, 8), nn.BatchNorm1d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: Tensor) -> SimpleNamespace:
        assert self.drop.training == self.training
        logits = self.head(self.drop(self.norm(self.embed(input_ids).mean(1))))
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


def test_batch_statistics_do_not_move_and_are_the_ones_used() -> None:
    model = Normalised()
    model.norm.running_mean = torch.randn(8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert set(before) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    outcome = a_round(model, a_recipe())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert outcome.delta["norm.weight"].any()
    assert model.drop.training
    assert not model.norm.training


# -- batches


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("examples", "batch"), [(10, 4), (12, 4), (3, 8), (1, 1), (75, 4)])
def test_batches_cover_each_epoch_exactly_once(examples: int, batch: int, by_length: bool) -> None:
    indices = np.arange(examples) * 3 + 1
    lengths = torch.arange(400).flip(0) % 7 if by_length else None
    per_epoch = math.ceil(examples / batch)
    drawn = list(batches(indices, batch, 3 * per_epoch, seed=5, lengths=lengths))
    epochs = [drawn[start : start + per_epoch] for start in range(0, len(drawn), per_epoch)]
    for epoch in epochs:
        assert sorted(index for chosen in epoch for index in chosen) == indices.tolist()
        assert [len(chosen) for chosen in epoch[:-1]] == [batch] * (per_epoch - 1)
    assert examples < 10 or epochs[0] != epochs[1]


def test_batches_stop_in_the_middle_of_an_epoch_and_depend_on_the_seed_alone() -> None:
    indices = np.arange(40)
    five = list(batches(indices, 4, 5, seed=1))
    assert len(five) == 5
    assert list(batches(indices, 4, 13, seed=1))[:5] == five
    assert list(batches(indices, 4, 5, seed=2)) != five


def test_batches_by_length_hold_texts_of_like_length() -> None:
    lengths = torch.randint(1, 50, (64,), generator=torch.Generator().manual_seed(0))

    def padding(of: Tensor | None) -> int:
        chosen = [lengths[batch] for batch in batches(np.arange(64), 4, 16, seed=3, lengths=of)]
        return sum(int(len(row) * row.max() - row.sum()) for row in chosen)

    assert padding(lengths) < padding(None) / 3


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [({"steps": 7}, 3, 7), ({"epochs": 1}, 8, 2), ({"epochs": 1}, 9, 3), ({"epochs": 3}, 9, 9), ({"epochs": 2}, 1, 2)],
)
def test_steps_of_a_round(settings: dict[str, int], examples: int, steps: int) -> None:
    assert total_steps(examples, a_recipe(**settings)) == steps


# -- learning rate and optimisers


@pytest.mark.parametrize(
    ("schedule", "warmup", "progress", "factor"),
    [
        ("constant", 0.0, 0.0, 1.0),
        ("constant", 0.0, 0.9, 1.0),
        ("linear", 0.0, 0.0, 1.0),
        ("linear", 0.0, 0.25, 0.75),
        ("linear", 0.0, 1.0, 0.0),
        ("cosine", 0.0, 0.0, 1.0),
        ("cosine", 0.0, 0.5, 0.5),
        ("cosine", 0.0, 1 / 3, 0.75),
        ("cosine", 0.0, 1.0, 0.0),
        ("constant", 0.2, 0.05, 0.25),
        ("linear", 0.2, 0.0, 0.0),
        ("linear", 0.2, 0.1, 0.5),
        ("linear", 0.2, 0.2, 1.0),
        ("linear", 0.2, 0.6, 0.5),
        ("cosine", 0.5, 0.75, 0.5),
    ],
)
def test_the_rate_is_the_closed_form(schedule: str, warmup: float, progress: float, factor: float) -> None:
    settings = Train.model_validate({"steps": 1, "schedule": schedule, "warmup": warmup})
    assert rate(settings, progress) == pytest.approx(factor, abs=1e-12)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", get_args(Optimiser))
def test_every_optimiser_goes_downhill(name: Optimiser) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 128))
    optimiser = make_optimiser(Train(steps=1, optimiser=name, lr=1e-2), [weight])
    start = weight.detach().square().sum().item()
    for _ in range(5):
        optimiser.zero_grad()
        weight.square().sum().backward()
        optimiser.step()
    assert weight.isfinite().all()
    assert weight.detach().square().sum().item() < start


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_an_eight_bit_optimiser_keeps_its_state_in_bytes(name: Optimiser) -> None:
    weight = nn.Parameter(torch.randn(64, 128))
    optimiser = make_optimiser(Train(steps=1, optimiser=name), [weight])
    weight.square().sum().backward()
    optimiser.step()
    assert optimiser.state[weight]["state1"].dtype == torch.uint8


def test_weight_decay_reaches_the_optimiser() -> None:
    for name in get_args(Optimiser):
        optimiser = make_optimiser(Train(steps=1, optimiser=name, weight_decay=0.3), [nn.Parameter(torch.ones(2))])
        assert optimiser.param_groups[0]["weight_decay"] == 0.3


# -- scores


def figures(scores: list[Score]) -> dict[tuple[str, str], float]:
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
    model = llama(seed=2, initializer_range=0.5) if task == LANGUAGE else bert(seed=2, initializer_range=0.5)
    found, wanted = figures(score(model, data, batch, task)), slow_scores(model, data)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-12), key
    assert 0 < wanted["all", "accuracy"] < 1
    assert wanted["film", "loss"] != wanted["book", "loss"]


def test_without_domains_only_the_whole_is_scored() -> None:
    found = figures(score(bert(), few_texts(domains=False), 4, TEXT))
    assert found.keys() == {("all", "accuracy"), ("all", "loss")}


def test_the_scores_of_a_batch_do_not_depend_on_dropout_or_make_gradients() -> None:
    model = bert().train()
    assert score(model, few_texts(), 4, TEXT) == score(model, few_texts(), 4, TEXT)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_language_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    found = figures(score(model, few_texts(language=True), 4, LANGUAGE))
    assert found["all", "perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
    assert found["all", "loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)
