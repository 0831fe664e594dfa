"""Fill-mask: predict words that are hidden, as encoders such as BERT are pretrained.

What: the pretrained encoder is trained on with its own head, e.g. to adapt it to the language of a domain.
Columns: ``text``. A text is cut to ``train.max_length`` tokens.
Loss: cross entropy of the hidden tokens, the mean over the hidden tokens of a batch. A part of each text's tokens
(``mask_fraction``), one at least, is hidden: 80 % become the mask token, 10 % a random token, 10 % stay. They are drawn
anew in each step; a scored text always hides the same tokens.
Metrics: perplexity of the hidden tokens (the main one; lower is better), loss and accuracy.
Models: those of transformers' ``AutoModelForMaskedLM``.
Source: Devlin et al., "BERT" (arXiv 1810.04805), section 3.1 and appendix A.1; drawn anew in each step as in Liu et
al., "RoBERTa" (arXiv 1907.11692), section 4.1.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune.accelerator import move_tensors
from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_masks import encode_maskable_texts
from fedtune.data.encoded_texts import IGNORED_LABEL
from fedtune.recipe.schema import Recipe
from fedtune.tasks._scores import ExampleScore, ScoreSums, score_places
from fedtune.tasks._text_task import TextTask, draw_tokens

__all__ = ["FillMask", "hide_tokens"]

_LARGEST_EXPONENT = 700.0
_KEPT, _REPLACED = 0.1, 0.2
"""Of the hidden tokens, a tenth stays as it is and another tenth becomes a random token."""


class FillMask(TextTask):
    """Predict hidden tokens."""

    name: ClassVar[str] = "fill-mask"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"

    mask_fraction: float = Field(0.15, gt=0, lt=1, description="fraction of a text's tokens that is hidden")

    @property
    def columns(self) -> tuple[str, ...]:
        """Texts alone."""
        return ("text",)

    @property
    def main_metric(self) -> str:
        """Perplexity of the hidden tokens."""
        return "perplexity"

    def count_predictions(self, labels: Tensor) -> int:
        """Tokens that are hidden in each text; labels [n, tokens] are -100 where none may be."""
        return int(self._count_hidden(labels).sum())

    def _count_hidden(self, labels: Tensor) -> Tensor:
        candidates = (labels != IGNORED_LABEL).sum(1)
        return (candidates * self.mask_fraction).round().long().clamp(min=1).minimum(candidates)

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Token ids, which are the labels too, apart from special tokens."""
        return encode_maskable_texts(examples, reader, recipe.train.max_length)

    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss on tokens that are drawn by torch's own generator, as dropout is."""
        hidden = hide_tokens(
            batch, self._count_hidden(batch["labels"]), _vocabulary_size(model), [None] * len(batch["labels"])
        )
        return super().compute_loss(model, hidden)

    def score_batch(self, model: nn.Module, batch: Mapping[str, Tensor], reader: Any) -> list[ExampleScore]:
        """One prediction for each token that a text hides whenever it is scored."""
        hidden = hide_tokens(
            batch, self._count_hidden(batch["labels"]), _vocabulary_size(model), _make_generators(batch)
        )
        return super().score_batch(model, hidden, reader)

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """One prediction for each hidden token."""
        return score_places(logits, labels)

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """Perplexity beside accuracy and loss."""
        return super().compute_metrics(sums) | {"perplexity": math.exp(min(sums.mean_loss, _LARGEST_EXPONENT))}

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tokens."""
        ids = draw_tokens(model, recipe, generator)
        masks = torch.full((len(ids),), int(self.load_reader(recipe).mask_token_id))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "mask_token": masks}


def _vocabulary_size(model: nn.Module) -> int:
    able: Any = model
    return int(able.get_input_embeddings().num_embeddings)


def _make_generators(batch: Mapping[str, Tensor]) -> list[torch.Generator]:
    """One for each text, seeded by its tokens alone, so that a text's score is always the same."""
    rows = zip(batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu(), strict=True)
    return [torch.Generator().manual_seed(zlib.crc32(ids[mask].numpy().tobytes())) for ids, mask in rows]


def hide_tokens(
    batch: Mapping[str, Tensor],
    counts: Tensor,
    vocabulary_size: int,
    generators: Sequence[torch.Generator | None],
) -> dict[str, Tensor]:
    """The batch with ``counts`` [n] tokens of each text hidden, and labels for these alone.

    Candidates are the places with a label. ``mask_token`` [n] is the number of the mask token. Without a generator a
    text's random numbers come from torch's own. Tokens are drawn and hidden on the CPU, so that they are the same for
    every device.
    """
    device = batch["input_ids"].device
    batch, counts = move_tensors(batch, torch.device("cpu")), counts.cpu()
    ids, labels = batch["input_ids"].clone(), torch.full_like(batch["labels"], IGNORED_LABEL)
    for row, generator in enumerate(generators):
        candidates = (batch["labels"][row] != IGNORED_LABEL).nonzero()[:, 0]
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[: int(counts[row])]]
        roles = torch.rand(len(chosen), generator=generator)
        others = torch.randint(vocabulary_size, (len(chosen),), generator=generator)
        hidden = torch.where(roles < _REPLACED, others, batch["mask_token"][row])
        labels[row, chosen] = ids[row, chosen]
        ids[row, chosen] = torch.where(roles < _KEPT, ids[row, chosen], hidden)
    hidden_batch = {**batch, "input_ids": ids, "labels": labels}
    return move_tensors({name: one for name, one in hidden_batch.items() if name != "mask_token"}, device)
