"""Token classification: a tag for each word of a text, such as the names and places in it.

What: the model gets a new head over the pretrained encoder, with one output for each tag.
Columns: ``words`` (a list) and ``tags`` (a list of the same length). The first token of a word carries its tag; its
further tokens are not predicted. Words beyond ``train.max_length`` tokens are cut off, and a warning says how many.
Loss: cross entropy over the tags, the mean over the tagged tokens of a batch.
Metrics: f1 of whole entities (the main one), precision, recall, accuracy per word and loss. Entities are read from tags
such as B-PER and I-PER by seqeval, as CoNLL's own script reads them; a tag without a prefix is an entity for itself.
Models: those of transformers' ``AutoModelForTokenClassification``.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_texts import IGNORED_LABEL
from fedtune.data.encoded_words import encode_words
from fedtune.recipe.schema import Recipe
from fedtune.tasks._scores import ExampleScore, ScoreSums, score_places
from fedtune.tasks._text_task import TextTask, draw_tokens

__all__ = ["TokenClassification"]


class TokenClassification(TextTask):
    """Predict the tag of each word."""

    name: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    peft_type: ClassVar[str | None] = "TOKEN_CLS"

    @property
    def columns(self) -> tuple[str, ...]:
        """Words and their tags."""
        return ("words", "tags")

    @property
    def has_new_head(self) -> bool:
        """Return True."""
        return True

    @property
    def keeps_outputs(self) -> bool:
        """Return True: entities are not sums over words."""
        return True

    @property
    def main_metric(self) -> str:
        """F1 of entities."""
        return "f1"

    def count_predictions(self, labels: Tensor) -> int:
        """Tokens with a tag; labels [n, tokens]."""
        return int((labels != IGNORED_LABEL).sum())

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Token ids, and the tag number of each word's first token."""
        return encode_words(examples, reader, recipe.train.max_length)

    def score_batch(self, model: nn.Module, batch: Mapping[str, Tensor], reader: Any) -> list[ExampleScore]:
        """One prediction for each tagged token; the output is the predicted and the wanted tag names."""
        labels = batch["labels"]
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        config: Any = model.config
        logits = model(**inputs).logits.float()
        pairs = zip(logits.argmax(-1), labels, strict=True)
        outputs = [_name_tags(*pair, config.id2label) for pair in pairs]
        return [
            score._replace(output=output)
            for score, output in zip(self.score_logits(logits, labels), outputs, strict=True)
        ]

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """One prediction for each tagged token; logits [n, tokens, tags], labels [n, tokens]."""
        return score_places(logits, labels)

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """Entity-level precision, recall and F1, and accuracy and loss per word."""
        return {**_compute_entity_metrics(sums.outputs), **super().compute_metrics(sums)}

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tokens, each with a random tag."""
        ids = draw_tokens(model, recipe, generator)
        labels = torch.randint(max(num_labels, 1), ids.shape, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _name_tags(predicted: Tensor, wanted: Tensor, names: Mapping[int, str]) -> tuple[list[str], list[str]]:
    """Names of the predicted and the wanted tags, where there is a wanted one."""
    counted = wanted != IGNORED_LABEL
    return [names[tag] for tag in predicted[counted].tolist()], [names[tag] for tag in wanted[counted].tolist()]


def _compute_entity_metrics(pairs: list[tuple[list[str], list[str]]]) -> dict[str, float]:
    """Precision, recall and F1 of entities; NaN where there is neither an entity nor a prediction of one."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    predicted, wanted = [one for one, _ in pairs], [one for _, one in pairs]
    if all(tag == "O" for row in (*predicted, *wanted) for tag in row):
        return dict.fromkeys(("f1", "precision", "recall"), math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tags that are none of the IOB schemes
        found = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
        return {name: float(score(wanted, predicted, zero_division=0)) for name, score in found.items()}
