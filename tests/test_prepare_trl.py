"""A prepared model in TRL's ``SFTTrainer``, which computes its loss from hidden states and the weight of the head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer

import fedtune
from fedtune.errors import ModelError
from tests.fusion_models import save_tokenizer, words
from tests.tiny import few_texts, llama

pytest.importorskip("trl", reason="TRL is not installed; pip install trl")

from trl import SFTConfig, SFTTrainer

STEPS, LR = 4, 0.05
ROWS = few_texts(language=True).rows
UNITS: dict[str, tuple[Any, int | None]] = {
    "lora": ({"lora": {"rank": 4}}, 2),
    "meft": ({"meft": {"dropout": 0.0}}, None),
}
"""Techniques, and the steps of a round where they act between rounds."""


def prepare(units: Any) -> tuple[fedtune.PreparedModel, torch.optim.Optimizer]:
    """A model in double precision, because TRL adds in another order."""
    prepared = fedtune.prepare(llama().double(), units, task="text-generation")
    return prepared, torch.optim.SGD([one for one in prepared.model.parameters() if one.requires_grad], lr=LR)


def train_in_plain_loop(units: Any, steps_per_round: int | None) -> dict[str, Tensor]:
    prepared, optimiser = prepare(units)
    prepared.attach(optimiser, steps_per_round=steps_per_round, total_steps=STEPS)
    batch = few_texts(language=True).make_batch(range(len(ROWS)))
    for _ in range(STEPS):
        prepared.model.train()(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return dict(prepared.model.named_parameters())


def train_in_sft_trainer(units: Any, steps_per_round: int | None, folder: Path) -> fedtune.PreparedModel:
    """Two micro-batches of six rows are a step on all of them, in whatever order. The rest is TRL's own default."""
    prepared, optimiser = prepare(units)
    save_tokenizer(folder, words())
    arguments = SFTConfig(
        str(folder), max_steps=STEPS, per_device_train_batch_size=6, gradient_accumulation_steps=2, max_grad_norm=0,
        save_strategy="no", report_to=[], logging_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False,
    )  # fmt: skip
    SFTTrainer(
        prepared.model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": ROWS, "labels": ROWS}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        optimizers=(optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda _: 1.0)),
        callbacks=[prepared.make_callback(steps_per_round=steps_per_round)],
    ).train()
    return prepared


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("units", "steps_per_round"), UNITS.values(), ids=UNITS)
def test_it_trains_as_a_plain_loop_does(units: Any, steps_per_round: int | None, tmp_path: Path) -> None:
    expected = train_in_plain_loop(units, steps_per_round)
    prepared = train_in_sft_trainer(units, steps_per_round, tmp_path)
    start, _ = prepare(units)
    assert len(start.trainable) > 4
    before, found = dict(start.model.named_parameters()), dict(prepared.model.named_parameters())
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=1e-7)
    assert max(float((one - before[name]).abs().max()) for name, one in expected.items()) > 1e-4
    assert (prepared.save(tmp_path / "saved") / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_a_term_of_the_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="loss is computed outside"):
        train_in_sft_trainer("lora+deft", 2, tmp_path)
