"""Text generation: predict the next token of a text.

What: the pretrained language model is trained on with its own head.
Columns: ``text``. A text is cut to ``train.max_length`` tokens; one that is not cut ends in the end token.
Loss: cross entropy of each token given those before it, the mean over the tokens of a batch. Padding does not count.
Packing: with ``train.packing: best-fit`` several short texts share a row of ``train.max_length`` tokens in training.
Each is predicted as if it were alone, and no further text is cut. Epochs and steps count rows; a client weighs by its
texts. A model that cannot keep the texts of a row apart is refused. Scoring is not packed.
Source of packing: Ding et al., "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830). Deviation: a text
longer than ``train.max_length`` is cut to it, not split into pieces.
Metrics: perplexity (the main one; lower is better), loss in nats per token, and accuracy of the next token.
Models: those of transformers' ``AutoModelForCausalLM``.
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_texts import IGNORED_LABEL, encode_texts
from fedtune.data.token_blocks import iter_shuffled_tokens, iter_token_blocks
from fedtune.recipe.schema import Recipe
from fedtune.tasks._scores import ExampleScore, ScoreSums, score_places
from fedtune.tasks._text_task import TextTask, draw_tokens

__all__ = ["TextGeneration"]

_LARGEST_EXPONENT = 700.0
"""exp of more overflows."""


class TextGeneration(TextTask):
    """Predict the next token."""

    name: ClassVar[str] = "text-generation"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"

    @property
    def columns(self) -> tuple[str, ...]:
        """Texts alone."""
        return ("text",)

    @property
    def main_metric(self) -> str:
        """Perplexity."""
        return "perplexity"

    @property
    def can_pack(self) -> bool:
        """Return True: every prediction is of one token of one text."""
        return True

    def count_predictions(self, labels: Tensor) -> int:
        """Tokens that are predicted from those before them; labels [n, tokens]."""
        return int((labels[:, 1:] != IGNORED_LABEL).sum())

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Token ids, which are the labels too."""
        return encode_texts(examples, reader, recipe.train.max_length)

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """One prediction for each token but the first; logits [n, tokens, vocabulary], labels [n, tokens]."""
        return score_places(logits[:, :-1], labels[:, 1:])

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """Perplexity beside accuracy and loss."""
        return super().compute_metrics(sums) | {"perplexity": math.exp(min(sums.mean_loss, _LARGEST_EXPONENT))}

    def iter_calibration_inputs(self, examples: Table, recipe: Recipe, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Texts end to end in whole blocks of ``train.max_length`` tokens, as the authors of AIM do it.

        The blocks come from the first 256 texts of a shuffled order that are at most a block long.
        """
        rows = iter_shuffled_tokens(examples["text"], self.load_reader(recipe))
        return iter_token_blocks(rows, block_size=recipe.train.max_length, batch=batch_size)

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tokens."""
        ids = draw_tokens(model, recipe, generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
