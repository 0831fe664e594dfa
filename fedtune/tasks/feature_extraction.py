"""Feature extraction: sentence embeddings in which texts that belong together are close.

What: the pretrained encoder or decoder is trained without a head. A text's embedding is the mean of its last hidden
states, or the first one (``pooling``), scaled to length 1. The similarity of two texts is the cosine.
Columns: ``text`` and ``text_pair``; with ``loss: cosine`` also the source's label column, the similarity that is wanted
(``number``). Each text is cut to ``train.max_length`` tokens.
Loss: with ``contrastive`` the cross entropy of finding a text's partner among all partners of the batch, similarities
times ``scale``. Other pairs with the same first or the same second text are no wrong answers and are left out. The
batch is the loss's own unit: it is never cut into micro-batches, and a larger one is harder. With ``cosine`` the mean
squared difference between similarity and label.
Metrics: with ``contrastive`` accuracy (the main one: how often the nearest of all scored partners is the right one),
mrr (mean reciprocal rank of the right one) and the loss over all scored pairs; with ``cosine`` spearman (the main one),
pearson and loss.
Models: those of transformers' ``AutoModel`` that read text.
Source: Reimers and Gurevych, "Sentence-BERT" (arXiv 1908.10084), section 3 (pooling, squared error of the cosine);
Henderson et al., "Efficient natural language response suggestion" (arXiv 1705.00652), section 4.4 (other pairs of the
batch as wrong answers).
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.data import EncodedDataset, Table
from fedtune.data.encoded_pairs import encode_pairs
from fedtune.recipe.schema import Recipe
from fedtune.tasks._correlation import correlate
from fedtune.tasks._scores import ExampleScore, ScoreSums
from fedtune.tasks._text_task import TextTask, draw_tokens

__all__ = ["FeatureExtraction"]


class FeatureExtraction(TextTask):
    """Embed texts."""

    name: ClassVar[str] = "feature-extraction"
    auto_class: ClassVar[str] = "AutoModel"
    peft_type: ClassVar[str | None] = "FEATURE_EXTRACTION"

    loss: Literal["contrastive", "cosine"] = Field("contrastive", description="cosine needs a similarity per pair")
    scale: float = Field(20.0, gt=0, description="of similarities in the contrastive loss")
    pooling: Literal["mean", "first"] = Field("mean", description="hidden states that make the embedding")

    @property
    def columns(self) -> tuple[str, ...]:
        """The texts, and with the cosine loss their similarity."""
        return ("text", "text_pair", "number") if self.loss == "cosine" else ("text", "text_pair")

    @property
    def can_split_batch(self) -> bool:
        """Whether a pair's loss is its own."""
        return self.loss == "cosine"

    @property
    def keeps_outputs(self) -> bool:
        """Return True: pairs are compared with each other."""
        return True

    @property
    def has_accuracy(self) -> bool:
        """Whether a prediction can be correct."""
        return self.loss == "contrastive"

    @property
    def main_metric(self) -> str:
        """The usual metric of the loss."""
        return "spearman" if self.loss == "cosine" else "accuracy"

    def encode_examples(self, examples: Table, recipe: Recipe, reader: Any) -> EncodedDataset:
        """Token ids of both texts; labels are similarities, or 1."""
        told = "number" in examples.column_names
        labels = torch.tensor(examples["number"] if told else [1.0] * len(examples), dtype=torch.float32)
        return encode_pairs(examples, reader, recipe.train.max_length, labels)

    def compute_loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """See the card."""
        first, second = self._embed(model, batch)
        if self.loss == "cosine":
            return F.mse_loss((first * second).sum(-1), batch["labels"])
        return self._compare(first, second, _compare_hashes(*_hash_texts(batch)))

    def _embed(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embeddings [n, width] of the first and of the second texts."""
        mask = batch["attention_mask"]
        states: Tensor = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
        if self.pooling == "mean":
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            pooled = states[:, 0]
        first, second = F.normalize(pooled, dim=-1).chunk(2)
        return first, second

    def _compare(self, first: Tensor, second: Tensor, equal: Tensor) -> Tensor:
        """The contrastive loss of pairs [n, width]; ``equal`` [n, n] says which pairs have a text in common."""
        similar = self.scale * first @ second.T
        return F.cross_entropy(
            similar.masked_fill(equal.to(first.device), -math.inf), torch.arange(len(first), device=first.device)
        )

    def score_batch(self, model: nn.Module, batch: Mapping[str, Tensor], reader: Any) -> list[ExampleScore]:
        """One prediction for each pair; the output is both embeddings and the label."""
        first, second = self._embed(model, batch)
        errors = ((first * second).sum(-1) - batch["labels"]).square().tolist()
        texts = zip(*_hash_texts(batch), strict=True)
        outputs = zip(first.cpu(), second.cpu(), batch["labels"].tolist(), texts, strict=True)
        return [ExampleScore(1, 0, error, output) for error, output in zip(errors, outputs, strict=True)]

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """See the card."""
        if self.loss == "contrastive":
            return self._rank(sums)
        similar = [float(first @ second) for first, second, *_ in sums.outputs]
        pairs = zip(similar, [label for _, _, label, _ in sums.outputs], strict=True)
        return {**correlate(list(pairs)), **self.compute_basic_metrics(sums)}

    def compute_basic_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """With the contrastive loss they compare all pairs with each other."""
        found = self._rank(sums) if self.loss == "contrastive" else super().compute_basic_metrics(sums)
        return {name: value for name, value in found.items() if name != "mrr"}

    def _rank(self, sums: ScoreSums) -> dict[str, float]:
        if not sums.outputs:
            return dict.fromkeys(("accuracy", "mrr", "loss"), math.nan)
        first, second = (torch.stack([output[side] for output in sums.outputs]) for side in (0, 1))
        equal = _compare_hashes(*zip(*(texts for *_, texts in sums.outputs), strict=True))
        return {**_rank_partners(first, second, equal), "loss": float(self._compare(first, second, equal))}

    def save_model_extras(self, model: nn.Module, recipe: Recipe, folder: Path) -> None:
        """Write the files that make sentence-transformers pool and scale as training did."""
        config: Any = model.config
        names = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
            for number, (name, path) in enumerate(names)
        ]
        pooling = {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_mean_tokens": self.pooling == "mean",
            "pooling_mode_cls_token": self.pooling == "first",
        }
        for _, path in names[1:]:
            (folder / path).mkdir()
        _write_json(folder / "modules.json", modules)
        _write_json(folder / "1_Pooling" / "config.json", pooling)
        _write_json(folder / "sentence_bert_config.json", {"max_seq_length": recipe.train.max_length})

    def make_random_batch(
        self, model: nn.Module, recipe: Recipe, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Random tokens for both texts."""
        ids = torch.cat([draw_tokens(model, recipe, generator), draw_tokens(model, recipe, generator)])
        labels = torch.rand(recipe.train.batch_size, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _hash_texts(batch: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """A number for each of the first and of the second texts; padding behind a text does not change it."""
    rows = zip(batch["input_ids"].cpu(), batch["attention_mask"].bool().cpu(), strict=True)
    found = [hash(tuple(ids[mask].tolist())) for ids, mask in rows]
    return found[: len(found) // 2], found[len(found) // 2 :]


def _compare_hashes(first: Sequence[int], second: Sequence[int]) -> Tensor:
    """[n, n]: whether two different pairs have the same first or the same second text."""
    sides = [torch.tensor(side)[:, None] == torch.tensor(side) for side in (first, second)]
    return (sides[0] | sides[1]) & ~torch.eye(len(first), dtype=torch.bool)


def _rank_partners(first: Tensor, second: Tensor, equal: Tensor) -> dict[str, float]:
    """How well the right partner of each text ranks among all that are wrong; a tie counts against it."""
    similar = (first @ second.T).masked_fill(equal, -math.inf)
    ranks = (similar >= similar.diagonal()[:, None]).sum(1).double()
    return {"accuracy": float((ranks == 1).double().mean()), "mrr": float((1 / ranks).mean())}
