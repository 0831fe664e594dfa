"""A prepared model in loops that are not fedtune's: a plain one and the Trainer of transformers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import fedtune
from fedtune import techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import Recipe, TaskUnit, Unit
from fedtune.seeds import derive_seed
from fedtune.tasks import get_task
from fedtune.techniques import ExtraPayload
from fedtune.training import ClientRound, get_model_state, set_model_state, train_local_model
from fedtune.training.cpu_threads import use_cpu_threads
from tests.tiny import FewTexts, a_training_recipe, bert, few_texts, llama, texts

STEPS = 20
MEFT = "meft+fused-cross-entropy"
OPTIMISERS = ["sgd", "adamw"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as fedtune's own loop takes. On some processors bits depend on their number."""
    with use_cpu_threads(1):
        yield


@dataclass
class Recorded:
    """Examples that keep every batch that was made of them."""

    examples: FewTexts
    batches: list[dict[str, Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.examples, name)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        self.batches.append(self.examples.make_batch(indices))
        return self.batches[-1]


def recipe_for(optimiser: str, units: list[Any], rounds: int = 1, **settings: Any) -> Recipe:
    recipe = a_training_recipe(
        rounds=rounds, techniques=units, optimiser=optimiser, lr=0.05, lr_schedule="constant", max_grad_norm=None,
        weight_decay=0.01, local_steps=STEPS // rounds, **settings,
    )  # fmt: skip
    return recipe.model_copy(update={"task": TaskUnit(name="text-generation")})


def train_in_fedtune(
    units: list[Any], optimiser: str, rounds: int = 1, count: int = 12
) -> tuple[dict[str, Tensor], list[Any]]:
    """The trained weights and the batches of a federation of one client."""
    recipe, model, examples = recipe_for(optimiser, units, rounds), llama(), Recorded(few_texts(language=True))
    chosen = techniques.build_techniques([Unit.model_validate(unit) for unit in units])
    task = get_task("text-generation")
    shared = techniques.apply_techniques(chosen, model, task, derive_seed(0, "techniques"))
    state = get_model_state(model, shared)
    for number in range(1, rounds + 1):
        client = ClientRound(model, chosen, recipe, examples, np.arange(count), number, 0)
        outcome = train_local_model(client, state)
        state = get_model_state(model, shared)
        sent = [ExtraPayload(1.0, outcome.extra_payload)]
        state = techniques.after_aggregation(chosen, state, number, sent)
    set_model_state(model, state)
    return {name: one.detach().clone() for name, one in model.named_parameters()}, examples.batches


def make_optimiser(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=0.05, weight_decay=0.01)
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.01)


def dropout_seed(number: int = 1) -> int:
    return derive_seed(0, number, 0, "dropout")


class SeedDropout(TrainerCallback):
    """Begin the random numbers of dropout where fedtune's loop does; the Trainer has drawn some by then."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            torch.manual_seed(dropout_seed())


class InOrder(Trainer):
    """Takes the batches as they are."""

    def get_train_dataloader(self) -> Any:
        return self.train_dataset


@dataclass
class Batches:
    """What the Trainer asks of a loader."""

    batches: list[dict[str, Tensor]]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def train_in_trainer(
    model: Any, batches: list[dict[str, Tensor]], kind: str, folder: Path, callbacks: list[Any], **options: Any
) -> None:
    optimiser = make_optimiser(kind, model)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=len(batches), max_grad_norm=0, save_strategy="no", report_to=[],
        logging_strategy="no", disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
    InOrder(
        model,
        arguments,
        train_dataset=Batches(batches),
        optimizers=(optimiser, constant),
        callbacks=callbacks,
    ).train()


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, one in expected.items() if not torch.equal(found[name], one)]


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_three_loops_give_the_same_bits(kind: str, tmp_path: Path) -> None:
    before = parameters_of(llama())
    expected, batches = train_in_fedtune(["meft", "fused-cross-entropy"], kind)
    assert len(batches) == STEPS
    plain = fedtune.prepare(llama(), MEFT, task="text-generation")
    assert set(plain.trainable) == {name for name in expected if ".adapters." in name}
    assert any(not torch.equal(expected[name], one) for name, one in parameters_of(plain.model).items())
    optimiser = make_optimiser(kind, plain.model.train())
    torch.manual_seed(dropout_seed())
    for batch in batches:
        plain.model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert_same(parameters_of(plain.model), expected)
    other = fedtune.prepare(llama(), MEFT, task="text-generation")
    train_in_trainer(other.model, batches, kind, tmp_path, [other.make_callback(), SeedDropout()])
    assert_same(parameters_of(other.model), expected)
    assert before.keys() - {name for name in before if torch.equal(before[name], expected[name])} == set()


def test_a_loop_with_accelerate_gives_the_same_bits() -> None:
    expected, batches = train_in_fedtune(["meft", "fused-cross-entropy"], "adamw")
    prepared = fedtune.prepare(llama(), MEFT, task="text-generation")
    accelerator = Accelerator(cpu=True)
    model, optimiser = accelerator.prepare(prepared.model.train(), make_optimiser("adamw", prepared.model))
    torch.manual_seed(dropout_seed())
    for batch in batches:
        accelerator.backward(model(**batch).loss)
        optimiser.step()
        optimiser.zero_grad()
    assert_same(parameters_of(accelerator.unwrap_model(model)), expected)


ROUNDS = 4
PRUNING = {"density": 0.5, "update_every": 1, "last_update_round": 9}
ACTING: dict[str, tuple[int, list[Any]]] = {
    "lora+deft": (12, ["lora", "deft"]),
    "pruning": (1, [{"dynamic-pruning": PRUNING}]),
    "pruning by clients": (1, [{"dynamic-pruning": {**PRUNING, "updated_by": "clients", "extrusion": None}}]),
}
"""Techniques that act at each step, or between rounds, on so many examples.

A client picks new active weights by its first examples, and another loop by its last batch; one example is both.
"""


@pytest.mark.parametrize(("count", "units"), ACTING.values(), ids=ACTING)
def test_techniques_that_act_between_rounds_do_so_in_every_loop(count: int, units: list[Any], tmp_path: Path) -> None:
    expected, batches = train_in_fedtune(units, "adamw", ROUNDS, count)
    batches = batches[:STEPS] if count == 1 else batches
    assert len(batches) == STEPS
    plain = fedtune.prepare(llama(), units, task="text-generation")
    optimiser = make_optimiser("adamw", plain.model.train())
    plain.attach(optimiser, steps_per_round=STEPS // ROUNDS)
    for batch in batches:
        plain.model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert_same(parameters_of(plain.model), expected)
    other = fedtune.prepare(llama(), units, task="text-generation")
    train_in_trainer(other.model, batches, "adamw", tmp_path, [other.make_callback(steps_per_round=STEPS // ROUNDS)])
    assert_same(parameters_of(other.model), expected)


def test_without_the_optimiser_a_technique_that_changes_gradients_is_refused() -> None:
    prepared = fedtune.prepare(llama(), {"dynamic-pruning": {"density": 0.5}}, task="text-generation")
    batch = texts(prepared.model)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"dynamic-pruning changes the gradients .* call attach\(optimiser"):
        prepared.model.train()(**batch)
    assert prepared.measure(batch).activation_bytes > 0
    with torch.no_grad():
        prepared.model(**batch)
    optimiser = make_optimiser("sgd", prepared.model)
    with pytest.raises(ModelError, match="trains something else in each round; say how many steps"):
        prepared.attach(optimiser)
    prepared.attach(optimiser, steps_per_round=5)
    prepared.model(**batch).loss.backward()
    optimiser.step()
    weight = prepared.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    mask = prepared.model.get_buffer("model.layers.0.mlp.up_proj.mask")
    assert not weight[mask == 0].any()
    assert weight[mask == 1].all()


def test_the_learning_rate_of_a_technique_holds_for_one_step() -> None:
    """Extrusion raises the rate; the schedule of the optimiser goes on as if it had not."""
    units = [{"dynamic-pruning": {"update_every": 1, "density": 0.5}}]
    prepared = fedtune.prepare(llama(), units, task="text-generation")
    optimiser = make_optimiser("sgd", prepared.model.train())
    rates: list[float] = []
    prepared.attach(optimiser, steps_per_round=4)
    optimiser.register_step_pre_hook(lambda one, *_: rates.append(one.param_groups[0]["lr"]))
    optimiser.param_groups[0]["lr"] = 1e-5
    prepared.model(**texts(prepared.model)).loss.backward()  # type: ignore[arg-type]
    optimiser.step()
    assert rates[0] > 1e-5
    assert optimiser.param_groups[0]["lr"] == 1e-5


@pytest.mark.parametrize("units", ["lora+deft", MEFT])
def test_it_is_saved_while_training_goes_on_and_merges_into_the_same_model(units: str, tmp_path: Path) -> None:
    prepared = fedtune.prepare(llama(), units, task="text-generation")
    batch = texts(prepared.model)  # type: ignore[arg-type]
    optimiser = make_optimiser("sgd", prepared.model.train())
    for _ in range(3):
        prepared.model(**batch).loss.backward()
        optimiser.step()
    before = {name: one.clone() for name, one in prepared.model.named_parameters()}
    expected = prepared.model.eval()(**batch).logits
    saved = prepared.save(tmp_path / "saved")
    assert_same(parameters_of(prepared.model), before)
    loaded = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).eval()
    torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert prepared.merge() is prepared.model
    torch.testing.assert_close(prepared.model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    prepared.save(tmp_path / "merged")
    with pytest.raises(ModelError, match="merged into the model already"):
        prepared.merge()
    with pytest.raises(fedtune.FedtuneError, match="exists already"):
        prepared.save(tmp_path / "merged")


def test_a_merged_model_is_prepared_again_and_a_prepared_one_is_not() -> None:
    model = llama()
    prepared = fedtune.prepare(model, ["lora"], task="text-generation")
    with pytest.raises(ModelError, match="is prepared already"):
        fedtune.prepare(model, ["lora"], task="text-generation")
    prepared.merge()
    assert fedtune.prepare(model, {"lora": {"rank": 2}}, task="text-generation").count_parameters().trainable > 0


def test_measuring_changes_nothing_and_sees_what_a_technique_saves() -> None:
    batch = texts(llama(), rows=8, length=32)
    figures = {}
    for units in ("full", MEFT):
        prepared = fedtune.prepare(llama(), units, task="text-generation")
        prepared.model.eval()
        parameter = next(one for one in prepared.model.parameters() if one.requires_grad)
        parameter.grad = torch.ones_like(parameter)
        state, random = {n: one.clone() for n, one in prepared.model.state_dict().items()}, torch.get_rng_state()
        figures[units] = prepared.measure(batch)
        assert_same(prepared.model.state_dict(), state)
        assert torch.equal(torch.get_rng_state(), random)
        assert parameter.grad is not None
        assert bool((parameter.grad == 1).all())
        assert not any(layer.training for layer in prepared.model.modules())
    assert figures[MEFT].activation_bytes < figures["full"].activation_bytes / 3
    assert figures[MEFT].peak_bytes < figures["full"].peak_bytes


def test_the_trainer_is_refused_where_it_would_fail_at_its_first_checkpoint(tmp_path: Path) -> None:
    prepared = fedtune.prepare(llama(), "lora", task="text-generation")
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = InOrder(
        prepared.model, arguments, train_dataset=Batches([texts(llama())]),
        callbacks=[prepared.make_callback(steps_per_round=1)],
    )  # fmt: skip
    with pytest.raises(ModelError, match="set save_strategy='no' and call save"):
        trainer.train()


@pytest.mark.parametrize(
    ("units", "error", "message"),
    [
        ("lorra", RecipeError, "techniques: there is no 'lorra'; did you mean 'lora'"),
        ("deft", RecipeError, "techniques: deft trains nothing; add full"),
        ({"lora": {"rank": 0}}, RecipeError, "techniques, lora: rank is 0"),
        ([3], RecipeError, "techniques: write them as 'lora[+]bias'"),
        ("full+lora", RecipeError, "full cannot be combined with lora"),
        ("qlora", ModelError, "qlora needs a model in four bits"),
        ("mobiletl", ModelError, "LlamaForCausalLM"),
    ],
)
def test_wrong_units_are_refused(units: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fedtune.prepare(llama(), units, task="text-generation")


def test_batch_norms_keep_their_statistics_in_a_plain_loop() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 2)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.head(self.norm(pixel_values).mean((2, 3)))  # type: ignore[no-any-return]

    prepared = fedtune.prepare(Net(), "head-only", task="image-classification")
    before = {name: one.clone() for name, one in prepared.model.named_buffers()}
    prepared.model.train()(torch.randn(4, 3, 5, 5)).sum().backward()
    assert_same(dict(prepared.model.named_buffers()), before)
    assert prepared.trainable == ["head.weight", "head.bias"]


def test_positional_inputs_are_named() -> None:
    prepared = fedtune.prepare(bert(), "full+deft", task="text-classification")
    batch = texts(prepared.model)  # type: ignore[arg-type]
    prepared.model.eval()
    named = prepared.model(**batch).loss
    assert torch.equal(prepared.model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss, named)


def test_accumulated_batches_count_the_terms_of_techniques_once(tmp_path: Path) -> None:
    """The Trainer tells the loss of a batch, whole or in two halves."""
    whole = texts(llama(), rows=4)
    halves = [{name: one[rows] for name, one in whole.items()} for rows in (slice(2), slice(2, 4))]
    losses = []
    for place, batches in enumerate(([whole], halves)):
        prepared = fedtune.prepare(llama(), {"full": {}, "deft": {"density_weight": 5.0}}, task="text-generation")
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(place)), max_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            logging_strategy="no", use_cpu=True, gradient_accumulation_steps=len(batches),
        )  # fmt: skip
        callbacks = [prepared.make_callback()]
        trainer = InOrder(prepared.model, arguments, train_dataset=Batches(batches), callbacks=callbacks)
        losses.append(trainer.train().training_loss)
    plain = float(llama()(**whole).loss.detach())
    assert losses[0] > plain + 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_resumed_training_is_in_the_round_of_its_step() -> None:
    prepared = fedtune.prepare(llama(), "lora", task="text-generation")
    assert all(".lora_B." in name for name in prepared.trainable)
    prepared.attach(make_optimiser("sgd", prepared.model), steps_per_round=2)
    prepared.skip_to_step(3)
    assert all(".lora_A." in name for name in prepared.trainable)
    prepared.skip_to_step(4)
    assert all(".lora_B." in name for name in prepared.trainable)


def test_a_loss_that_would_lose_the_term_of_a_technique_is_refused() -> None:
    prepared = fedtune.prepare(llama(), "full+deft", task="text-generation")
    batch = texts(llama())
    with pytest.raises(ModelError, match="a technique adds a term to the loss, but the loss is computed outside"):
        prepared.model.train()(input_ids=batch["input_ids"])
    with torch.no_grad():
        prepared.model(input_ids=batch["input_ids"])
    assert float(prepared.model(**batch).loss.detach()) > float(llama()(**batch).loss.detach()) + 0.5
