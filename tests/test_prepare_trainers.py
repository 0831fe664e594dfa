"""Settings of Trainers and of accelerate that models with adapters are known to go wrong with."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerControl, TrainingArguments

import fedtune
from fedtune.errors import ModelError
from fedtune.models.transformers_logging import silence_transformers
from tests.test_prepare import Batches, InOrder
from tests.tiny import llama, texts

pytestmark = pytest.mark.filterwarnings("ignore")

BOTH = {"lora": {"trained_factors": "both"}}
BATCH = texts(llama(), rows=8)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    """accelerate keeps the precision of the first Trainer of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def prepare(units: Any) -> tuple[fedtune.PreparedModel, torch.optim.Optimizer]:
    """In double precision, so that sums in another order are equal within a tolerance that nothing else passes."""
    prepared = fedtune.prepare(llama().double(), units, task="text-generation")
    return prepared, torch.optim.SGD([one for one in prepared.model.parameters() if one.requires_grad], lr=0.05)


def make_trainer(units: Any, folder: Path, batches: list[dict[str, Tensor]], **options: Any) -> tuple[Any, Any]:
    """A Trainer that takes the batches as they are."""
    prepared, optimiser = prepare(units)
    arguments = TrainingArguments(
        str(folder), max_grad_norm=0, save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True,
        use_cpu=True, **{"max_steps": len(batches), **options},
    )  # fmt: skip
    constant = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)
    trainer = InOrder(
        prepared.model, arguments, train_dataset=Batches(batches), optimizers=(optimiser, constant),
        callbacks=[prepared.make_callback()],
    )  # fmt: skip
    return prepared, trainer


def train(units: Any, folder: Path, batches: list[dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    prepared, trainer = make_trainer(units, folder, batches, **options)
    trainer.train()
    return dict(prepared.model.named_parameters())


def train_in_plain_loop(units: Any, batches: list[dict[str, Tensor]], *shares: float) -> dict[str, Tensor]:
    """Each batch is a step; with ``shares``, as many batches are, which count as much."""
    prepared, optimiser = prepare(units)
    prepared.attach(optimiser)
    for place, batch in enumerate(batches):
        share = shares[place % len(shares)] if shares else 1.0
        (prepared.model.train()(**batch).loss * share).backward()
        if not shares or (place + 1) % len(shares) == 0:
            optimiser.step()
            optimiser.zero_grad()
    return dict(prepared.model.named_parameters())


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], within: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=within)


def test_reentrant_checkpointing_by_the_trainer_keeps_the_gradients_behind_frozen_embeddings(tmp_path: Path) -> None:
    settings = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    found = train(BOTH, tmp_path, [BATCH, BATCH], **settings)
    assert_near(found, train_in_plain_loop(BOTH, [BATCH, BATCH]))
    start = dict(prepare(BOTH)[0].model.named_parameters())
    assert any(not torch.equal(found[name], one) for name, one in start.items())


ACCUMULATED: dict[str, Any] = {
    "a term": {**BOTH, "deft": {}},
    "dropped tokens": {"full": {}, "error-norm-truncation": {"fraction": 0.3, "start": 0.0}},
}


@pytest.mark.parametrize("units", ACCUMULATED.values(), ids=ACCUMULATED)
def test_accumulated_batches_count_with_their_share_of_all_tokens(units: Any, tmp_path: Path) -> None:
    """As in a local round. Each batch divides by the tokens that it keeps."""
    short = {**BATCH, "labels": BATCH["labels"].index_fill(1, torch.arange(4), -100)}
    found = train(units, tmp_path, [BATCH, short], gradient_accumulation_steps=2, max_steps=1)
    assert_near(found, train_in_plain_loop(units, [BATCH, short], 7 / 11, 4 / 11))


def test_autocast_of_a_trainer_takes_a_fused_loss(tmp_path: Path) -> None:
    """The model is in single precision, and the products of its layers in bfloat16."""
    found = train("full+fused-cross-entropy", tmp_path, [BATCH, BATCH], bf16=True)
    expected, start = train("full", tmp_path, [BATCH, BATCH], bf16=True), prepare("full")[0].model
    for name, one in expected.items():
        moved = (one - start.get_parameter(name)).norm()
        assert (found[name] - one).norm() < 0.02 * moved, name


def begin_training(prepared: fedtune.PreparedModel, optimiser: torch.optim.Optimizer, cards: int = 1) -> None:
    """What a Trainer calls before its first step."""
    arguments: Any = SimpleNamespace(n_gpu=cards, save_strategy="no")
    state: Any = SimpleNamespace(max_steps=2, global_step=0)
    prepared.make_callback().on_train_begin(arguments, state, TrainerControl(), optimizer=optimiser)


def test_a_trainer_that_begins_again_begins_at_the_first_step() -> None:
    prepared, optimiser = prepare(BOTH)
    seen: list[float] = []
    prepared.model.register_forward_pre_hook(lambda *_: seen.append(prepared._hooks.progress))
    for _ in range(2):
        begin_training(prepared, optimiser)
        for _ in range(2):
            prepared.model.train()(**BATCH).loss.backward()
            optimiser.step()
    assert seen == [0.0, 0.5] * 2


def test_copies_of_a_model_on_several_cards_are_refused() -> None:
    with pytest.raises(ModelError, match="copies of the prepared model on 2 cards"):
        begin_training(*prepare(BOTH), cards=2)


def test_a_loss_outside_the_model_is_refused_where_a_technique_works_inside() -> None:
    """A Trainer with label smoothing gives the model no labels, and those of TRL ask for what they make a loss from."""
    unlabelled = {name: one for name, one in BATCH.items() if name != "labels"}
    truncated, fused = (prepare({**BOTH, name: {}})[0] for name in ("error-norm-truncation", "fused-cross-entropy"))
    with pytest.raises(ModelError, match="error-norm-truncation changes how the model computes its loss"):
        truncated.model.train()(**unlabelled)
    assert fused.model.train()(**unlabelled).logits is not None
    for prepared in (truncated, fused):
        with pytest.raises(ModelError, match="computed outside the model"):
            prepared.model.train()(**BATCH, fused_lm_head=True)


def test_rounds_are_refused_where_several_processes_train_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, optimiser = prepare("lora")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(ModelError, match="lora trains something else in each round, which 4 processes"):
        prepared.attach(optimiser, steps_per_round=2)
    prepare(BOTH)[0].attach(optimiser)


def test_a_model_with_adapters_of_peft_is_refused_until_they_are_merged() -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ModelError, match="has adapters of PEFT; prepare the model that merge_and_unload"):
        fedtune.prepare(model, "lora", task="text-generation")
    assert fedtune.prepare(model.merge_and_unload(), "lora", task="text-generation").trainable


def test_accelerate_accumulates_and_casts_as_a_plain_loop_does(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    prepared = fedtune.prepare(llama(), "lora", task="text-generation")
    other = fedtune.prepare(llama(), "lora", task="text-generation")
    optimisers = [
        torch.optim.SGD([p for p in one.model.parameters() if p.requires_grad], lr=0.05) for one in (prepared, other)
    ]
    model, stepped = accelerator.prepare(prepared.model.train(), optimisers[0])
    prepared.attach(stepped, steps_per_round=1)
    other.attach(optimisers[1], steps_per_round=1)
    for _ in range(2):
        for half in (slice(0, 4), slice(4, 8)):
            part = {name: one[half] for name, one in BATCH.items()}
            with accelerator.accumulate(model):
                accelerator.backward(model(**part).loss)
                stepped.step()
                stepped.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = other.model.train()(**part).loss
            (loss / 2).backward()
        optimisers[1].step()
        optimisers[1].zero_grad()
    assert_near(dict(prepared.model.named_parameters()), dict(other.model.named_parameters()), within=1e-6)
    with silence_transformers(), torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(prepared.save(tmp_path / "saved")).eval()
        expected = other.model.eval()(**BATCH).logits
        torch.testing.assert_close(loaded(**BATCH).logits, expected, rtol=0, atol=1e-5)
