"""Packed texts: no token is lost, no text sees another, and a text weighs as much as without packing."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from fedtune import techniques
from fedtune.data.best_fit import pack_best_fit
from fedtune.data.encoded_texts import EncodedTexts, pad_rows
from fedtune.data.packed_texts import pack_texts
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe import unit_registry
from fedtune.recipe.schema import Recipe, Unit
from fedtune.tasks import get_task
from fedtune.techniques import begin_step
from fedtune.training import ClientRound, compute_step_loss, get_model_state, set_train_mode, train_local_model
from fedtune.training.micro_batches import compute_loss_weights
from fedtune.training.packing_checks import check_packing
from fedtune.training.training_rows import make_training_rows
from tests.families import FAMILIES
from tests.technique_steps import chosen
from tests.tiny import a_training_recipe

LENGTHS = (3, 9, 1, 16, 5, 5, 2, 12, 7, 4)


def texts(lengths: Sequence[int] = LENGTHS, *, answers: bool = False) -> EncodedTexts:
    """Random texts; with ``answers`` only the second half of each is predicted, as in a chat."""
    random = np.random.default_rng(0)
    rows = [random.integers(1, 50, size).tolist() for size in lengths]
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in rows]
    wanted = pad_rows(labels, -100).long() if answers else None
    return EncodedTexts(pad_rows(rows, 0), torch.tensor(lengths), wanted, None, labels_per_token=answers)


def recipe(packing: str = "best-fit", **settings: Any) -> Recipe:
    made = a_training_recipe(packing=packing, max_length=16, **settings)
    return made.model_copy(
        update={"task": Recipe.model_validate({**made.model_dump(), "task": "text-generation"}).task}
    )


def slow_best_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """The rooms that are left, by looking through all rows for each piece."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= size]
        row = min(fitting, key=lambda row: rooms[row], default=None)
        if row is None:
            rooms.append(capacity - size)
        else:
            rooms[row] -= size
    return rooms


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_those_of_a_search_through_all_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = np.minimum(random.lognormal(2, 1, 200).astype(int) + 1, 64).tolist()
    rows = pack_best_fit(sizes, 64)
    assert sorted(piece for row in rows for piece in row) == list(range(200))
    rooms = [64 - sum(sizes[piece] for piece in row) for row in rows]
    assert min(rooms) >= 0
    assert sorted(rooms) == sorted(slow_best_fit(sizes, 64))
    assert len(rows) <= 11 / 9 * -(-sum(sizes) // 64) + 1


def test_nothing_and_full_rows_are_packed_too() -> None:
    assert pack_best_fit([], 8) == []
    assert pack_best_fit([8, 8], 8) == [[0], [1]]


@pytest.mark.parametrize("answers", [False, True])
def test_each_token_is_kept_and_predicted_as_often_as_before(answers: bool) -> None:
    data, task = texts(answers=answers), get_task("text-generation")
    packed = pack_texts(data, np.arange(len(data)), 16, seed=1)
    assert len(packed) < len(data)
    batch, plain = packed.make_batch(range(len(packed))), data.make_batch(range(len(data)))
    assert packed.lengths.max() <= 16
    assert packed.lengths.sum() == sum(LENGTHS)
    assert packed.count_texts(range(len(packed))) == len(data)
    assert Counter(batch["input_ids"][batch["input_ids"] > 0].tolist()) == Counter(
        plain["input_ids"][plain["input_ids"] > 0].tolist()
    )
    assert task.count_predictions(batch["labels"]) == task.count_predictions(plain["labels"])
    assert (batch["labels"][batch["position_ids"] == 0] == -100).all()


def test_packing_follows_the_seed_and_the_lengths_of_rows_do_not() -> None:
    data, rows = texts([4] * 20 + [3] * 20), np.arange(40)
    first, again, other = (pack_texts(data, rows, 16, seed) for seed in (1, 1, 2))
    assert first.rows == again.rows
    assert first.rows != other.rows
    assert sorted(first.lengths.tolist()) == sorted(other.lengths.tolist())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_text_has_the_logits_and_the_losses_that_it_has_alone(family: str, attention: str) -> None:
    model = FAMILIES[family].model().eval()
    model.set_attn_implementation(attention)
    data = texts()
    packed = pack_texts(data, np.arange(len(data)), 16, seed=1)
    batch = packed.make_batch(range(len(packed)))
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    for row, places in enumerate(packed.rows):
        start = 0
        for place in places:
            alone = data.make_batch([place])
            wanted, size = model(**{**alone, "labels": None}).logits[0], LENGTHS[place]
            torch.testing.assert_close(logits[row, start : start + size], wanted, rtol=0, atol=1e-5)
            found = F.cross_entropy(
                logits[row, start : start + size - 1], batch["labels"][row, start + 1 : start + size]
            )
            if size > 1:
                torch.testing.assert_close(found, model(**alone).loss, rtol=1e-5, atol=1e-6)
            start += size


def quiet(model: PreTrainedModel) -> PreTrainedModel:
    """Without dropout, which would differ by place."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


def gradients(joined: str, batch: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    model = quiet(FAMILIES["llama"].model())
    units = chosen(joined, **settings)
    techniques.apply_techniques(units, model, get_task("text-generation"), 0)
    check_packing(recipe(), model)
    set_train_mode(model)
    begin_step(units, model, batch, 0.5)
    compute_step_loss(get_task("text-generation"), model, batch).backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


SETTINGS: dict[str, dict[str, Any]] = {
    "activation-pruning": {"prune": 0.0},
    "division": {"min_bytes": 1 << 30},
    "int8-activations": {"min_bytes": 1 << 30},
    "lora": {"dropout": 0.0},
    "meft": {"dropout": 0.0},
}
UNFIT = {"batch-norm", "batch-norm-statistics", "bias", "head-only", "last-blocks", "mobiletl", "tinytl", "qlora"} | {
    "fedkseed"
}
"""Techniques that a Llama cannot carry, whose base is loaded in four bits, or that have no gradients."""


@pytest.mark.parametrize("name", sorted(set(unit_registry.list_unit_names("fedtune.techniques")) - UNFIT))
def test_every_technique_has_the_gradients_of_the_texts_apart(name: str) -> None:
    data = texts()
    packed = pack_texts(data, np.arange(len(data)), 16, seed=1)
    unit = unit_registry.build_unit("fedtune.techniques", Unit(name=name), "here")
    joined = name if unit.selects_trainable_tensors else f"{name}+full"
    found, wanted = (
        gradients(joined, one.make_batch(range(len(one))), **SETTINGS.get(name, {})) for one in (packed, data)
    )
    scale = max(float(one.abs().max()) for one in wanted.values())
    tolerance = 1e-2 if name == "deft" else 1e-5  # its density term counts the padding of packed rows
    assert scale > 0
    assert all(float((found[key] - wanted[key]).abs().max()) <= tolerance * scale for key in wanted)


def test_micro_batches_of_packed_rows_add_up() -> None:
    packed = pack_texts(texts(answers=True), np.arange(len(LENGTHS)), 16, seed=1)
    task, whole = get_task("text-generation"), packed.make_batch(range(len(packed)))
    parts = [packed.make_batch([row]) for row in range(len(packed))]
    wanted = gradients("full", whole)
    shares = compute_loss_weights(task, parts)
    assert sum(shares) == pytest.approx(1)
    sums = {name: torch.zeros_like(one) for name, one in wanted.items()}
    for part, share in zip(parts, shares, strict=True):
        for name, one in gradients("full", part).items():
            sums[name] += share * one
    assert all(torch.allclose(sums[name], one, atol=1e-6) for name, one in wanted.items())


def client(packing: str, data: EncodedTexts, **settings: Any) -> ClientRound:
    units = chosen("full")
    model = quiet(FAMILIES["llama"].model())
    techniques.apply_techniques(units, model, get_task("text-generation"), 0)
    made = recipe(packing, local_epochs=2, batch_size=4, **settings)
    return ClientRound(model, units, made, data, np.arange(len(data)), 1, 0)


def test_a_packed_round_takes_less_steps_and_weighs_the_same() -> None:
    random = np.random.default_rng(3)
    sizes = np.clip(random.lognormal(1.5, 0.8, 64).astype(int), 2, 16).tolist()
    steps, found = {}, {}
    for packing in ("none", "best-fit"):
        work = client(packing, texts(sizes))
        data = make_training_rows(work.examples, work.rows, work.recipe.train, lambda _: 0)
        steps[packing] = -(-len(data.rows) // 4)
        found[packing] = train_local_model(work, get_model_state(work.model, list(work.model.state_dict())))
    assert steps["best-fit"] <= 0.5 * steps["none"]
    assert found["best-fit"].num_examples == found["none"].num_examples == 2 * 64


def test_a_packed_round_repeats_bit_for_bit() -> None:
    deltas = []
    for _ in range(2):
        work = client("best-fit", texts())
        deltas.append(train_local_model(work, get_model_state(work.model, list(work.model.state_dict()))).delta)
    assert all(torch.equal(one, deltas[1][name]) for name, one in deltas[0].items())


def test_models_that_mix_texts_are_refused() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        space = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2))
    for model in (space, FAMILIES["opt"].model()):
        with pytest.raises(
            ModelError, match=r"does not keep the texts of a packed row apart.*set train.packing to none"
        ):
            check_packing(recipe(), model)
        check_packing(recipe("none"), model)


def test_other_tasks_and_grouped_batches_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.packing: text-classification is not trained on packed texts"):
        check_packing(a_training_recipe(packing="best-fit"), FAMILIES["bert"].model())
    with pytest.raises(ValueError, match="group_by_length has nothing to group"):
        a_training_recipe(packing="best-fit", group_by_length=True)
