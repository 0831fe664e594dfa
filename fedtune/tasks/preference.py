"""Preference: write rather the text that people chose than the one that they rejected (DPO).

What: the pretrained language model is trained on with its own head. The reference of the paper is the model that the
run starts from: its log-probabilities are computed once for each example, so that no second copy of it is held.
Columns: ``prompt``, ``chosen`` and ``rejected``. A completion ends in the end token. A text longer than
``train.max_length`` tokens loses the beginning of its prompt.
Loss: -log sigmoid(beta (r_chosen - r_rejected)), the mean over the pairs of a batch. r is the log-probability of a
completion under the trained model minus that under the reference (equation 7 of the paper).
Metrics: accuracy (the main one: how often r_chosen is larger), margin (the mean of beta (r_chosen - r_rejected)), loss.
Models: those of transformers' ``AutoModelForCausalLM``.
Source: Rafailov et al., "Direct Preference Optimization" (arXiv 2305.18290), section 4.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.accelerator import find_device, move_tensors
from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_preferences import EncodedPreferences, encode_preferences
from fedtune.data.encoded_prompts import EncodedPrompts, encode_text_prompts
from fedtune.data.encoded_texts import IGNORED_LABEL
from fedtune.errors import ModelError
from fedtune.recipe.evaluation_settings import Prompt
from fedtune.recipe.schema import Recipe
from fedtune.tasks._scores import ExampleScore, ScoreSums
from fedtune.tasks._text_task import TextTask, draw_tokens, require_texts

__all__ = ["Preference"]

_REFERENCE_BATCH = 8


class Preference(TextTask):
    """Prefer the chosen text."""

    name: ClassVar[str] = "preference"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"

    beta: float = Field(0.1, gt=0, description="how much a preference may move the model away from the reference")

    @property
    def columns(self) -> tuple[str, ...]:
        """Prompts and two completions."""
        return ("prompt", "chosen", "rejected")

    @property
    def keeps_outputs(self) -> bool:
        """Return True: the margins are averaged."""
        return True

    @property
    def needs_reference(self) -> bool:
        """Return True."""
        return True

    def count_predictions(self, labels: Tensor) -> int:
        """Pairs; labels [2 n, tokens]."""
        return len(labels) // 2

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Token ids of both texts, with labels in the completions."""
        return encode_preferences(examples, reader, recipe.train.max_length)

    def encode_prompts(self, prompts: Sequence[Prompt], examples: Table, recipe: Recipe, reader: Any) -> EncodedPrompts:
        """Texts to continue."""
        return encode_text_prompts(reader, require_texts(self, prompts))

    @torch.no_grad()
    def add_reference(self, model: nn.Module, examples: EncodedDataset) -> EncodedDataset:
        """The examples with the log-probabilities of their completions under ``model``."""
        assert isinstance(examples, EncodedPreferences)
        training = model.training
        model.eval()
        starts = range(0, len(examples), _REFERENCE_BATCH)
        rows = [range(start, min(start + _REFERENCE_BATCH, len(examples))) for start in starts]
        device = find_device(model)
        batches = (move_tensors(examples.make_batch(part), device) for part in rows)
        found = [_compute_log_probabilities(model, batch).cpu().chunk(2) for batch in batches]
        model.train(training)
        return replace(examples, references=torch.cat([side[number] for number in (0, 1) for side in found]))

    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """See the card."""
        return -F.logsigmoid(self._compute_margins(model, batch)).mean()

    def _compute_margins(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """beta (r_chosen - r_rejected) of each pair [n]."""
        if "references" not in batch:
            raise ModelError(
                "preference compares with the model that a run starts from; score it with fedtune evaluate RUN"
            )
        chosen, rejected = (_compute_log_probabilities(model, batch) - batch["references"]).chunk(2)
        return self.beta * (chosen - rejected)

    def score_batch(self, model: nn.Module, batch: Mapping[str, Tensor], reader: Any) -> list[ExampleScore]:
        """One prediction for each pair; the output is its margin. A tie is not correct."""
        margins = self._compute_margins(model, batch)
        losses = -F.logsigmoid(margins)
        return [
            ExampleScore(1, int(margin > 0), loss, margin)
            for margin, loss in zip(margins.tolist(), losses.tolist(), strict=True)
        ]

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """The mean margin beside accuracy and loss."""
        margin = sum(sums.outputs) / len(sums.outputs) if sums.outputs else math.nan
        return {**self.compute_basic_metrics(sums), "margin": margin}

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tokens, the second half of each text as its completion."""
        ids = torch.cat([draw_tokens(model, recipe, generator), draw_tokens(model, recipe, generator)])
        labels = ids.clone()
        labels[:, : ids.shape[1] // 2] = IGNORED_LABEL
        references = torch.zeros(len(ids))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "references": references}


def _compute_log_probabilities(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probability of each completion [2 n]: the sum over its tokens, given all tokens before them."""
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits, labels = logits[:, :-1].float(), batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED_LABEL)
    return -losses.sum(1)
