"""On the real encoder: exact gradients, a start next to the pretrained model, and most of the memory saved."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedtune import models
from fedtune.memory import StorageMeter
from fedtune.recipe.schema import ModelSettings
from tests.meft_models import equal
from tests.technique_steps import TEXT, gradients, shared

SENTENCES = ["The film was great.", "A dull book, and far too long.", "The battery died after two days.", "Fine."]


def minilm() -> PreTrainedModel:
    model = models.load_model(ModelSettings(source="sample:minilm"), TEXT, ("bad", "good"), seed=0)
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    encoded = models.load_tokenizer(ModelSettings(source="sample:minilm"))(SENTENCES, padding=True, return_tensors="pt")
    return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


@torch.no_grad()
def embedded(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    states = model.eval().base_model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled: Tensor = (states * mask).sum(1) / mask.sum(1)
    return pooled


@pytest.mark.parametrize("variant", ["diff", "meft1"])
def test_gradients_are_exact(variant: str, batch: dict[str, Tensor]) -> None:
    labelled = {**batch, "labels": torch.tensor([1, 0, 0, 1])}
    model, stored = minilm(), minilm()
    shared("meft", model, TEXT, variant=variant)
    shared("meft", stored, TEXT, variant=variant, stored_activations=True)
    assert equal(gradients(model, labelled)[0], gradients(stored, labelled)[0])


def test_diff_starts_next_to_the_pretrained_encoder(batch: dict[str, Tensor]) -> None:
    wanted = embedded(minilm(), batch)
    close = {}
    for variant, merge in (("diff", "main"), ("meft1", "main"), ("meft1", "mean")):
        model = minilm()
        shared("meft", model, TEXT, variant=variant, merge=merge)
        close[variant, merge] = float(torch.cosine_similarity(embedded(model, batch), wanted).mean())
    assert close["diff", "main"] > 0.985
    assert close["diff", "main"] > close["meft1", "main"] > close["meft1", "mean"]


def test_the_peak_is_84_percent_below_that_of_full_fine_tuning() -> None:
    """As in the paper, whose largest saving that is."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (4, 128), generator=random)
    peaks = {}
    for joined, settings in (("full", {}), ("meft", {"pieces": 2})):
        model = minilm()
        shared(joined, model, TEXT, **settings)
        with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
            model.train()(input_ids=ids, labels=torch.zeros(4, dtype=torch.long)).loss.backward()
        peaks[joined] = meter.peak_bytes
    assert peaks["meft"] < 0.16 * peaks["full"]
