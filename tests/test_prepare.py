"""A prepared model in loops that are not fedtune's: a plain one and the Trainer of transformers."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
from tests.tiny import FewTexts, a_training_recipe, bert, few_texts, llama, texts

STEPS = 20
MEFT = "meft+fused-cross-entropy"
OPTIMISERS = ["sgd", "adamw"]


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
        client = ClientRound(model, chosen, recipe, examples, np.arange(count), number, 0)  # type: ignore[arg-type]
        outcome = train_local_model(client, state)
        state = get_model_state(model, shared)
        sent = [ExtraPayload(1.0, outcome.extra_payload)]
        state = techniques.after_aggregation(chosen, state, number, sent)
    set_model_state(model, state)
    return {name: one.detach().clone() for name, one in model.named_parameters()}, examples.batches


def make_optimiser(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    chosen = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    return chosen(parameters, lr=0.05, weight_decay=0.01)


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
    constant = torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    InOrder(
        model, arguments, train_dataset=Batches(batches), optimizers=(optimiser, constant), callbacks=callbacks  # type: ignore[arg-type]
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
