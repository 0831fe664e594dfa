import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fedtune import techniques
from fedtune.errors import ClientUpdateError, DataError
from fedtune.recipe.schema import Recipe, TaskUnit, Unit
from fedtune.seeds import derive_seed
from fedtune.tasks import get_task
from fedtune.techniques import Technique
from fedtune.training import (
    ClientRound,
    EvaluatedModel,
    LocalTrainingResult,
    compute_step_loss,
    evaluate_model,
    get_model_state,
    set_model_state,
    train_local_model,
    use_cpu_threads,
)
from fedtune.training.batches import batches
from fedtune.training.master_weights import masters_of
from fedtune.training.start import Start
from tests.tiny import VOCABULARY, FewTexts, a_training_recipe, bert, few_texts, llama

TEXT = get_task("text-classification")
LANGUAGE = get_task("text-generation")


def prepared(model: nn.Module, technique: str = "full") -> tuple[tuple[Technique, ...], dict[str, Tensor]]:
    """The techniques, applied, and the state they share."""
    chosen = techniques.build_techniques([Unit(name=name) for name in technique.split("+")])
    return chosen, get_model_state(model, techniques.apply_techniques(chosen, model, TEXT, 0))


INDICES = np.array([0, 2, 3, 4, 5, 7, 8, 9, 10, 11])


def a_round(
    model: nn.Module, recipe: Recipe, number: int = 1, client: int = 1, technique: str = "full"
) -> LocalTrainingResult:
    chosen, state = prepared(model, technique)
    return train_local_model(ClientRound(model, chosen, recipe, few_texts(), INDICES, number, client), state)


def readable_twin(model: PreTrainedModel, recipe: Recipe, number: int, client: int) -> tuple[dict[str, Tensor], float]:
    """What ``train_local_model`` promises, as one would write it for a notebook: deltas and the mean loss."""
    settings, data = recipe.train, few_texts()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    shuffling = np.random.default_rng(derive_seed(recipe.seed, number, client, "order"))
    per_round = settings.local_steps or (settings.local_epochs or 0) * math.ceil(len(INDICES) / settings.batch_size)
    torch.manual_seed(derive_seed(recipe.seed, number, client, "dropout"))
    model.train()
    losses: list[float] = []
    while len(losses) < per_round:
        order = shuffling.permutation(INDICES)
        for start in range(0, len(order), settings.batch_size):
            if len(losses) == per_round:
                break
            done = (per_round * (number - 1) + len(losses)) / (per_round * recipe.federation.rounds)
            if done < settings.warmup_ratio:
                factor = done / settings.warmup_ratio
            elif settings.lr_schedule == "linear":
                factor = 1 - (done - settings.warmup_ratio) / (1 - settings.warmup_ratio)
            elif settings.lr_schedule == "cosine":
                factor = (1 + math.cos(math.pi * (done - settings.warmup_ratio) / (1 - settings.warmup_ratio))) / 2
            else:
                factor = 1.0
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * factor
            optimiser.zero_grad()
            loss = model(**data.make_batch(order[start : start + settings.batch_size].tolist())).loss
            loss.backward()
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimiser.step()
            losses.append(loss.item())
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}, sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({}, 1),
        ({}, 2),
        ({"lr_schedule": "constant"}, 2),
        ({"lr_schedule": "cosine"}, 2),
        ({"lr_schedule": "linear", "warmup_ratio": 0.25}, 1),
        ({"lr_schedule": "cosine", "warmup_ratio": 0.5}, 2),
        ({"max_grad_norm": 0.1}, 1),
        ({"max_grad_norm": None}, 1),
        ({"weight_decay": 0.1, "lr": 3e-3}, 1),
        ({"local_epochs": 2, "lr_schedule": "constant"}, 1),
        ({"local_steps": 8}, 2),
    ],
)
def test_a_round_equals_a_bare_loop_to_the_bit(settings: dict[str, Any], number: int) -> None:
    recipe = a_training_recipe(**settings)
    outcome = a_round(bert(), recipe, number)
    with use_cpu_threads(recipe.train.threads):
        deltas, loss = readable_twin(bert(), recipe, number, client=1)
    assert outcome.delta.keys() == deltas.keys()
    assert all(torch.equal(outcome.delta[name], deltas[name]) for name in deltas)
    assert outcome.train_loss == pytest.approx(loss, abs=1e-12)
    assert any(delta.any() for delta in deltas.values())


@pytest.mark.parametrize(
    "settings",
    [{"max_grad_norm": 0.1}, {"lr_schedule": "constant"}, {"warmup_ratio": 0.25}, {"lr": 2e-3}, {"weight_decay": 0.1}],
)
def test_every_setting_the_bare_loop_is_compared_with_matters(settings: dict[str, Any]) -> None:
    plain, changed = a_round(bert(), a_training_recipe()), a_round(bert(), a_training_recipe(**settings))
    assert any(not torch.equal(plain.delta[name], changed.delta[name]) for name in plain.delta)


def same_bits(one: LocalTrainingResult, other: LocalTrainingResult) -> bool:
    return one.train_loss == other.train_loss and all(
        torch.equal(one.delta[name], other.delta[name]) for name in one.delta
    )


@pytest.mark.parametrize("technique", ["full", "lora", "bias+gradient-checkpointing"])
def test_a_round_gives_the_same_bits_whatever_ran_before(technique: str) -> None:
    model, recipe, data = bert(), a_training_recipe(), few_texts()
    chosen, state = prepared(model, technique)
    first = train_local_model(ClientRound(model, chosen, recipe, data, INDICES, 1, 0), state)
    train_local_model(ClientRound(model, chosen, recipe, data, np.array([1, 6]), 2, 1), state)
    evaluate_model(EvaluatedModel(model, TEXT, 5), data)
    torch.manual_seed(99)
    model(**data.make_batch([0, 1])).loss.backward()
    assert same_bits(first, train_local_model(ClientRound(model, chosen, recipe, data, INDICES, 1, 0), state))


def test_a_client_that_fails_midway_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = bert(), a_training_recipe()
    chosen, state = prepared(model)
    first = train_local_model(ClientRound(model, chosen, recipe, few_texts(), INDICES, 1, 0), state)
    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_local_model(ClientRound(model, chosen, recipe, few_texts(), INDICES, 1, 1), state)
    assert same_bits(first, train_local_model(ClientRound(model, chosen, recipe, few_texts(), INDICES, 1, 0), state))


def test_rounds_and_clients_draw_their_own_numbers() -> None:
    recipe = a_training_recipe(lr_schedule="constant")
    outcomes = [a_round(bert(), recipe, number, client) for number, client in ((1, 0), (1, 1), (2, 0))]
    assert len({outcome.train_loss for outcome in outcomes}) == 3


def test_a_round_leaves_the_random_state_and_the_threads_of_the_process_alone() -> None:
    model, recipe = bert(), a_training_recipe(threads=2, local_steps=1)
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    a_round(model, recipe)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    with use_cpu_threads(2):
        assert torch.get_num_threads() == 2


def test_only_what_is_trained_in_the_round_is_sent_and_the_rest_stays() -> None:
    model, recipe = bert(), a_training_recipe()
    chosen, state = prepared(model, "lora")
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in state}
    for number, factor in ((1, "B"), (2, "A")):
        outcome = train_local_model(ClientRound(model, chosen, recipe, few_texts(), INDICES, number, 0), state)
        head = {"classifier.weight", "classifier.bias"}
        assert outcome.delta.keys() == {name for name in state if f".lora_{factor}." in name} | head
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())


def test_the_outcome_counts_examples_with_repeats_and_ragged_batches() -> None:
    assert a_round(bert(), a_training_recipe(local_epochs=2)).num_examples == 20
    assert a_round(bert(), a_training_recipe(local_steps=4)).num_examples == 4 + 4 + 2 + 4
    outcome = a_round(bert(), a_training_recipe())
    assert outcome.seconds > 0
    assert outcome.peak_rss > 2**20


def test_saved_bytes_fall_with_techniques_that_keep_less() -> None:
    full, checkpointed, head = (
        a_round(bert(), a_training_recipe(), technique=name).activation_bytes
        for name in ("full", "full+gradient-checkpointing", "head-only")
    )
    assert head < checkpointed < full


def test_bfloat16_weights_follow_copies_in_single_precision() -> None:
    """The readable twin: the model holds the rounded copies, each gradient moves the copies."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).bfloat16()
    chosen, rounded = prepared(model)
    state = {name: tensor + 1e-5 for name, tensor in rounded.items()}
    recipe = a_training_recipe(
        optimiser="sgd", lr=1e-4, max_grad_norm=None, lr_schedule="constant", local_steps=3, batch_size=12
    )
    found = train_local_model(ClientRound(model, chosen, recipe, few_texts(), INDICES, 1, 0), state).delta
    copies = {name: tensor.clone() for name, tensor in state.items()}
    model.train()
    for batch in batches(INDICES, 12, 3, derive_seed(recipe.seed, 1, 0, "order")):
        set_model_state(model, copies)
        model.zero_grad()
        with use_cpu_threads(recipe.train.threads):
            compute_step_loss(TEXT, model, few_texts().make_batch(batch)).backward()
        for name, copy in copies.items():
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            copy.add_(gradient.float(), alpha=-1e-4)
    assert all(torch.equal(found[name], copies[name] - state[name]) for name in found)
    still = [name for name in found if torch.equal(copies[name].bfloat16(), state[name].bfloat16())]
    assert any(found[name].any() for name in still), "some move by less than bfloat16 can tell"


def test_a_round_that_moves_nothing_is_told() -> None:
    model = bert()
    chosen, state = prepared(model)
    recipe = a_training_recipe(optimiser="sgd", lr=1e-60)
    with pytest.warns(UserWarning, match="client 4 moved nothing in round 1: no gradient arrives, or train.lr is lost"):
        still = train_local_model(ClientRound(model, chosen, recipe, few_texts(), INDICES, 1, 4), state)
    assert not any(delta.any() for delta in still.delta.values())


def _short_texts(rows: list[list[int]]) -> FewTexts:
    return FewTexts(rows=rows, labels=None, domains=None, lengths=torch.tensor([len(row) for row in rows]))


@pytest.mark.parametrize("micro", [None, 1])
def test_texts_of_one_token_have_no_loss(micro: int | None) -> None:
    """A language model predicts nothing of them; 0 x nan must not reach the client's loss."""
    texts = _short_texts([[5], [6, 7, 8], [9], [4, 3]])
    chosen = techniques.build_techniques([Unit(name="full")])
    model = llama()
    state = get_model_state(model, techniques.apply_techniques(chosen, model, LANGUAGE, 0))
    task = TaskUnit(name="text-generation")
    recipe = a_training_recipe(batch_size=4, local_steps=2).model_copy(update={"task": task})
    one_by_one = a_training_recipe(batch_size=1, local_epochs=1).model_copy(update={"task": task})
    found = train_local_model(
        ClientRound(model, chosen, recipe, texts, np.arange(4), 1, 0, micro_batch_size=micro), state
    )
    assert math.isfinite(found.train_loss)
    assert all(delta.isfinite().all() for delta in found.delta.values())
    set_model_state(model, state)
    several = train_local_model(ClientRound(model, chosen, one_by_one, texts, np.arange(4), 1, 0), state)
    assert math.isfinite(several.train_loss)
    with pytest.raises(DataError, match="no example of the client has a second token"):
        train_local_model(ClientRound(model, chosen, recipe, _short_texts([[5], [6]]), np.arange(2), 1, 0), state)


def test_tensors_of_another_client_are_refused() -> None:
    model = bert()
    chosen, state = prepared(model)
    other = {"bert.pooler.dense.bias": torch.zeros(16)}
    with pytest.raises(ClientUpdateError, match=r"keeps for itself does not fit the model: bert.pooler.dense.bias"):
        train_local_model(
            ClientRound(model, chosen, a_training_recipe(), few_texts(), INDICES, 1, 0, local_tensors=other), state
        )


def test_bfloat16_weights_are_trained_through_fp32_masters() -> None:
    """A slow twin: AdamW on fp32 copies, whose rounding the model computes with."""
    model, recipe = bert().bfloat16(), a_training_recipe(local_epochs=1, lr=1e-5)
    chosen, rounded = prepared(model)
    received = {name: tensor + 1e-5 for name, tensor in rounded.items()}
    outcome = train_local_model(ClientRound(model, chosen, recipe, few_texts(), INDICES, 1, 1), received)
    with use_cpu_threads(recipe.train.threads):
        moved = twin_with_masters(bert().bfloat16(), received, recipe)
    assert all(torch.equal(outcome.delta[name], moved[name]) for name in moved)
    assert {delta.dtype for delta in outcome.delta.values()} == {torch.float32}
    set_model_state(model, received)
    starts = get_model_state(model, received)
    ends = {name: (received[name] + delta).bfloat16().float() for name, delta in outcome.delta.items()}
    unseen = [name for name in ends if torch.equal(ends[name], starts[name]) and bool(outcome.delta[name].any())]
    assert unseen  # tensors that bfloat16 alone would not have moved at all


def twin_with_masters(model: PreTrainedModel, received: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    set_model_state(model, received)
    masters = {name: received[name].clone() for name, _ in model.named_parameters()}
    optimiser = torch.optim.AdamW(masters.values(), weight_decay=recipe.train.weight_decay)
    order = np.random.default_rng(derive_seed(recipe.seed, 1, 1, "order")).permutation(INDICES)
    torch.manual_seed(derive_seed(recipe.seed, 1, 1, "dropout"))
    model.train()
    steps = -(-len(order) // recipe.train.batch_size)
    for step in range(steps):
        chosen = order[step * recipe.train.batch_size : (step + 1) * recipe.train.batch_size]
        model(**few_texts().make_batch(chosen.tolist())).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm or 1e9)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            masters[name].grad = parameter.grad.float()
            parameter.grad = None
        for group in optimiser.param_groups:
            group["lr"] = recipe.train.lr * (1 - step / steps / recipe.federation.rounds)
        optimiser.step()
        set_model_state(model, masters)
    return {name: masters[name] - received[name] for name in masters}


def test_fp32_training_makes_no_masters() -> None:
    model = bert()
    chosen, state = prepared(model)
    assert masters_of(model, Start(model, list(state), state)) == {}
    assert chosen


def test_what_a_technique_changed_as_the_round_began_is_no_part_of_the_delta() -> None:
    model = bert()
    _, state = prepared(model)
    set_model_state(model, state)
    name = "classifier.weight"
    model.get_parameter(name).data[0, 0] += 1.0  # a technique did this in begin_round
    start = Start(model, list(state), state)
    deltas = start.deltas(dict(model.named_parameters()), list(state))
    assert not any(delta.any() for delta in deltas.values())
    model.get_parameter(name).data[0, 1] += 0.5
    [delta] = start.deltas(dict(model.named_parameters()), [name]).values()
    assert [tuple(place) for place in delta.nonzero().tolist()] == [(0, 1)]


def test_the_state_is_a_copy_in_single_precision() -> None:
    model = bert().bfloat16()
    state = get_model_state(model, ["classifier.weight"])
    state["classifier.weight"] += 1
    assert state["classifier.weight"].dtype == torch.float32
    assert not torch.equal(model.get_parameter("classifier.weight").float(), state["classifier.weight"])
    set_model_state(model, state)
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
    outcome = a_round(model, a_training_recipe())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert outcome.delta["norm.weight"].any()
    assert model.drop.training
    assert not model.norm.training
