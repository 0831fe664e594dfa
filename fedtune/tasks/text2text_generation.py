"""Text-to-text generation: write a target text for a text, such as a summary or a translation.

What: the pretrained encoder-decoder is trained on with its own head.
Columns: ``text`` and ``target``. Each is cut to ``train.max_length`` tokens; the tokenizer ends both.
Loss: cross entropy of each target token given the text and the target tokens before it, the mean over the target
tokens of a batch. Padding does not count.
Metrics: rouge-l (the main one), rouge-1 and rouge-2 between the target and the text that the model writes greedily
(F-measure with stemming, by rouge-score); perplexity, loss and accuracy of the next target token. Writing takes most of
the time of a scoring: ``rouge: false`` leaves it out, and perplexity (lower is better) is the main metric then. Clients
that score on their own hold-out never write. ``evaluation.metrics: [exact_match, f1]`` compares both as SQuAD does.
Models: those of transformers' ``AutoModelForSeq2SeqLM``, such as T5 and BART.
Source: Lin, "ROUGE: a package for automatic evaluation of summaries" (ACL workshop 2004).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_prompts import EncodedPrompts
from fedtune.data.encoded_targets import encode_targets
from fedtune.data.encoded_texts import IGNORED_LABEL
from fedtune.recipe.evaluation_settings import Prompt
from fedtune.recipe.schema import Recipe
from fedtune.tasks._scores import ExampleScore, ScoreSums, score_places
from fedtune.tasks._text_task import TextTask, draw_tokens, require_texts

__all__ = ["Text2TextGeneration"]

_LARGEST_EXPONENT = 700.0
_ROUGE = {"rouge-l": "rougeL", "rouge-1": "rouge1", "rouge-2": "rouge2"}


class Text2TextGeneration(TextTask):
    """Write a target text."""

    name: ClassVar[str] = "text2text-generation"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_type: ClassVar[str | None] = "SEQ_2_SEQ_LM"

    rouge: bool = Field(True, description="write texts when the server scores the model, and compare them")
    max_new_tokens: int = Field(64, ge=1, description="most tokens of a written text")

    @property
    def columns(self) -> tuple[str, ...]:
        """Texts and what is to be written for them."""
        return ("text", "target")

    @property
    def main_metric(self) -> str:
        """The longest common subsequence, or else perplexity."""
        return "rouge-l" if self.rouge else "perplexity"

    @property
    def keeps_outputs(self) -> bool:
        """Whether texts are written and compared."""
        return self.rouge

    @property
    def compares_answers(self) -> bool:
        """Return True: the target is the wanted answer."""
        return True

    def encode_prompts(self, prompts: Sequence[Prompt], examples: Table, recipe: Recipe, reader: Any) -> EncodedPrompts:
        """Texts to write a text for, cut as those of training are."""
        texts = require_texts(self, prompts)
        found = reader(texts, truncation=True, max_length=recipe.train.max_length)["input_ids"]
        return EncodedPrompts([list(row) for row in found])

    def split_answers(self, batch: Mapping[str, Tensor], reader: Any) -> tuple[EncodedPrompts, list[str]]:
        """Texts and targets."""
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        return EncodedPrompts([ids[mask].tolist() for ids, mask in rows]), _decode(batch["labels"], reader)

    def count_predictions(self, labels: Tensor) -> int:
        """Target tokens; labels [n, tokens]."""
        return int((labels != IGNORED_LABEL).sum())

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Token ids of texts and of targets."""
        return encode_targets(examples, reader, recipe.train.max_length)

    def score_batch(self, model: nn.Module, batch: Mapping[str, Tensor], reader: Any) -> list[ExampleScore]:
        """One prediction for each target token; the output is the written and the wanted text."""
        labels = batch["labels"]
        scores = self.score_logits(model(**batch).logits.float(), labels)
        if not self.rouge or reader is None:
            return scores
        pairs = zip(self._write(model, batch, reader), _decode(labels, reader), strict=True)
        return [score._replace(output=pair) for score, pair in zip(scores, pairs, strict=True)]

    def score_logits(self, logits: Tensor, labels: Tensor) -> list[ExampleScore]:
        """One prediction for each target token; logits [n, tokens, vocabulary], labels [n, tokens]."""
        return score_places(logits, labels)

    def _write(self, model: Any, batch: Mapping[str, Tensor], reader: Any) -> list[str]:
        """A text for each example, the likeliest token at a time."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        written = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        found: list[str] = reader.batch_decode(written, skip_special_tokens=True)
        return found

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """See the card."""
        perplexity = math.exp(min(sums.mean_loss, _LARGEST_EXPONENT))
        found = {**super().compute_metrics(sums), "perplexity": perplexity}
        return {**_compute_rouge(sums.outputs), **found} if self.rouge else found

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tokens for texts and targets."""
        ids, targets = draw_tokens(model, recipe, generator), draw_tokens(model, recipe, generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": targets}


def _decode(labels: Tensor, reader: Any) -> list[str]:
    found: list[str] = reader.batch_decode(
        labels.masked_fill(labels == IGNORED_LABEL, reader.pad_token_id), skip_special_tokens=True
    )
    return found


def _compute_rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """The mean F-measures; NaN without a written text."""
    from rouge_score.rouge_scorer import RougeScorer

    if not pairs:
        return dict.fromkeys(_ROUGE, math.nan)
    scorer = RougeScorer(list(_ROUGE.values()), use_stemmer=True)
    scores = [scorer.score(wanted, written) for written, wanted in pairs]
    return {name: sum(one[key].fmeasure for one in scores) / len(scores) for name, key in _ROUGE.items()}
