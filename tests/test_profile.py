"""The figures of a case against closed forms and against a measurement without the profile."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fedtune import profiling, tasks, techniques
from fedtune.errors import DataError, ModelError, RecipeError
from fedtune.memory import StorageMeter
from fedtune.profiling import StepProfile, make_random_batch, profile_step
from fedtune.profiling.isolated_process import try_profile
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.unit_registry import list_unit_names
from fedtune.tasks import get_task
from fedtune.training import compute_step_loss, prepare_model, set_train_mode
from tests.federations import words
from tests.profile_examples import a_case, a_recipe, tiny_bert

LABELS = ("a", "b", "c")
HIDDEN, BETWEEN, LAYERS, RANK, FLOAT = 16, 32, 2, 3, 4
HEAD = 3 * HIDDEN + 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return a_recipe(tiny_bert(tmp_path_factory.mktemp("bert")))


def payload(shapes: dict[str, list[int]]) -> int:
    """Bytes of a safetensors file of fp32 tensors: length of the header, the header padded to eight, the numbers."""
    header, offset = {}, 0
    for name, shape in sorted(shapes.items()):
        end = offset + FLOAT * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + offset


def shapes(model: nn.Module, having: str = "") -> dict[str, list[int]]:
    found = {name: list(parameter.shape) for name, parameter in model.named_parameters() if having in name}
    return found | {name: list(model.get_parameter(name).shape) for name in ("classifier.weight", "classifier.bias")}


def test_full_trains_and_sends_every_parameter(recipe: Recipe) -> None:
    figures = profile_step(a_case(recipe, "full"))
    model, _, _ = prepare_model(recipe, LABELS)
    embeddings = (40 + 32 + 2) * HIDDEN + 2 * HIDDEN
    attention = 4 * (HIDDEN * HIDDEN + HIDDEN) + 2 * HIDDEN
    feeding = (HIDDEN * BETWEEN + BETWEEN) + (BETWEEN * HIDDEN + HIDDEN) + 2 * HIDDEN
    assert figures.trainable == embeddings + LAYERS * (attention + feeding) + (HIDDEN * HIDDEN + HIDDEN) + HEAD
    assert figures.wire_bytes == figures.down_bytes == payload(shapes(model))


def test_low_rank_pairs_are_counted_in_the_costlier_round(recipe: Recipe) -> None:
    figures = profile_step(a_case(recipe, "lora", rank=RANK))
    into_a = RANK * (LAYERS * (4 * HIDDEN + HIDDEN + BETWEEN) + HIDDEN)
    out_of_b = RANK * (LAYERS * (4 * HIDDEN + BETWEEN + HIDDEN) + HIDDEN)
    assert figures.trainable == max(into_a, out_of_b) + HEAD
    model, _, _ = prepare_model(with_lora(recipe), LABELS)
    assert figures.wire_bytes == max(payload(shapes(model, ".lora_A.")), payload(shapes(model, ".lora_B.")))
    assert figures.down_bytes == payload(shapes(model, ".lora_"))


def with_lora(recipe: Recipe) -> Recipe:
    units = [Unit(name="lora", settings={"rank": RANK})]
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"techniques": units})})


@pytest.mark.parametrize("joined", ["full", "full+gradient-checkpointing", "bias"])
def test_bytes_kept_and_at_the_peak_are_those_of_a_direct_measurement(recipe: Recipe, joined: str) -> None:
    case = a_case(recipe, joined)
    figures = profile_step(case)
    model, _, _ = prepare_model(Recipe.model_validate_json(case.recipe), LABELS)
    set_train_mode(model)
    batch = make_random_batch(model, recipe, 3)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss = compute_step_loss(get_task(recipe.task), model, batch)
        kept = meter.current_bytes
        loss.backward()
    assert (figures.kept_bytes, figures.peak_bytes) == (kept, meter.peak_bytes)


def test_where_rounds_differ_the_one_that_keeps_more_counts(recipe: Recipe) -> None:
    case = a_case(recipe, "lora")
    model, chosen, _ = prepare_model(Recipe.model_validate_json(case.recipe), LABELS)
    set_train_mode(model)
    batch, kept = make_random_batch(model, recipe, 3), []
    for number in (1, 2):
        techniques.begin_round(chosen, model, number)
        with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
            loss = compute_step_loss(get_task(recipe.task), model, batch)
            kept.append(meter.current_bytes)
        del loss
    assert kept[0] != kept[1]
    assert profile_step(case).kept_bytes == max(kept)


def test_nothing_is_compared_unless_it_is_asked_for(recipe: Recipe) -> None:
    figures = profile_step(a_case(recipe, "bias"))
    assert figures.gradient_error is None
    assert figures.seconds > 0


def test_random_inputs_repeat_fill_the_length_and_stay_in_the_vocabulary(recipe: Recipe) -> None:
    model, _, _ = prepare_model(recipe, LABELS)
    one, other = make_random_batch(model, recipe, 3), make_random_batch(model, recipe, 3)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["input_ids"].shape == (3, 8)
    assert 0 <= int(one["input_ids"].min()) <= int(one["input_ids"].max()) < 40
    assert int(one["labels"].max()) < 3
    assert one["attention_mask"].all()


def test_random_inputs_longer_than_the_model_reads_are_refused(recipe: Recipe) -> None:
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_length": 33})})
    with pytest.raises(ModelError, match=r"reads at most 32 tokens; lower train\.max_length, which is 33"):
        profile_step(a_case(longer, "full"))


def test_the_first_batch_holds_the_first_examples_padded_to_the_full_length(tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.max_length=12", "train.batch_size=5")
    corpus = tasks.load_data(recipe)
    batch = profiling.encode_first_batch(recipe, corpus)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 12)
    assert batch["labels"].tolist() == corpus.train["label"][:5]
    padding = batch["attention_mask"] == 0
    assert padding.any(1).all()
    assert not batch["input_ids"][padding].any()
    with pytest.raises(DataError, match=r"fewer than a batch; lower train\.batch"):
        profiling.encode_first_batch(words(tmp_path, "train.batch_size=5000"), corpus)


def test_the_yardsticks_stand_first_and_nothing_is_measured_twice(recipe: Recipe) -> None:
    own = [Unit(name="lora", settings={"rank": 4}), Unit(name="gradient-checkpointing")]
    found = profiling.make_profile_cases(
        recipe, [[Unit(name="bias")], own, [Unit(name="lora", settings={"rank": 8})]], LABELS, None
    )
    assert [case.technique for case in found] == [*profiling.BASELINES, "bias", "lora(rank=4)+gradient-checkpointing"]


def test_what_does_not_go_together_is_refused_before_anything_is_measured(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="there is no 'lorra'; did you mean 'lora'"):
        profiling.make_profile_cases(recipe, [[Unit(name="lorra")]], LABELS, None)
    with pytest.raises(RecipeError, match="full cannot be combined with lora"):
        profiling.make_profile_cases(recipe, [[Unit(name="full"), Unit(name="lora")]], LABELS, None)


def test_every_published_technique_is_among_all_of_them() -> None:
    found = {unit.name for units in profiling.list_profiled_techniques() for unit in units}
    assert found == set(list_unit_names("fedtune.techniques"))


def test_a_case_that_misfits_fails_with_its_sentence(recipe: Recipe, tmp_path: Path) -> None:
    nowhere = a_recipe(tmp_path / "nowhere")
    assert try_profile(a_case(nowhere, "full")) == profiling.FailedProfile(
        "full", f"{tmp_path / 'nowhere'} is not a model folder: it has no config.json; check model.source"
    )


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (RuntimeError("a\nb"), "RuntimeError: a"),
        (MemoryError(), "a step needs more memory than this machine has; try a smaller batch"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "a step needs more memory than this machine has; try a smaller batch",
        ),
    ],
)
def test_a_fault_nobody_foresaw_ends_as_one_sentence(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, raised: Exception, sentence: str
) -> None:
    def fail(case: object) -> StepProfile:
        raise raised

    monkeypatch.setattr("fedtune.profiling.isolated_process.profile_step", fail)
    row = try_profile(a_case(recipe, "full"))
    assert not isinstance(row, StepProfile)
    assert row.error == sentence
