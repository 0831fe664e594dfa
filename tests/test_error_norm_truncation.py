"""Error norm truncation: norms are those of one-hot vectors, dropped tokens have no gradient, kept ones the usual."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from fedtune import techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.tasks import get_task
from fedtune.techniques import begin_step, collect_metrics
from fedtune.techniques._filtered_loss import compute_error_norms
from fedtune.training import compute_step_loss
from tests.families import FAMILIES
from tests.technique_steps import LANGUAGE, TEXT, chosen
from tests.tiny import llama, texts


def one_hot_norms(logits: Tensor, labels: Tensor) -> Tensor:
    errors = logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])
    norms: Tensor = torch.linalg.vector_norm(errors, dim=-1)
    return norms


def sharp(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A model that is sure of what it predicts, so that error norms spread from 0 to √2."""
    model.lm_head.weight.data *= 60
    return model


def gradients(joined: str, batch: dict[str, Tensor], progress: float = 0.5, **settings: Any) -> dict[str, Tensor]:
    model = sharp(llama())
    units = chosen(joined, **settings)
    techniques.apply_techniques(units, model, LANGUAGE, 0)
    model.train()
    begin_step(units, model, batch, progress)
    loss = compute_step_loss(LANGUAGE, model, batch)
    loss.backward()
    return {"loss": loss.detach(), **{name: one.grad for name, one in model.named_parameters() if one.grad is not None}}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], one) for name, one in wanted.items())


def test_the_closed_form_is_the_distance_from_the_one_hot_vector() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 50, generator=random) * torch.logspace(-2, 2, 300)[:, None]
    labels = torch.randint(50, (300,), generator=random)
    counted = torch.arange(0, 300, 2)
    found = compute_error_norms(logits, labels, counted, None)
    torch.testing.assert_close(found, one_hot_norms(logits, labels)[counted], rtol=0, atol=1e-3)
    assert (found.square() - one_hot_norms(logits, labels)[counted].square()).abs().max() < 2e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= math.sqrt(2) + 1e-6


@pytest.mark.parametrize("settings", [{"threshold": math.sqrt(2) + 1e-3}, {"threshold": 0.1, "start": 0.6}])
@pytest.mark.parametrize("base", ["full", "fused-cross-entropy+full"])
def test_where_nothing_is_dropped_the_loss_is_the_plain_one_bit_for_bit(settings: Any, base: str) -> None:
    batch = texts(llama())
    assert equal(gradients(f"error-norm-truncation+{base}", batch, **settings), gradients(base, batch))


@pytest.mark.parametrize("joined", ["error-norm-truncation+full", "error-norm-truncation+fused-cross-entropy+full"])
@pytest.mark.parametrize("settings", [{"threshold": 1.2}, {"fraction": 0.3}])
def test_it_is_the_plain_loss_of_the_kept_tokens(joined: str, settings: dict[str, Any]) -> None:
    model, batch = sharp(llama()), texts(llama(), rows=6)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :3] = -100
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    norms = one_hot_norms(logits, labels.clamp(min=0)).masked_fill(~counted, 0)
    count = int(counted.sum())
    least = 1.2 if "threshold" in settings else float(norms.flatten().sort(descending=True)[0][int(0.3 * count)])
    kept = counted & (norms <= least)
    assert 0 < int(kept.sum()) < count
    wanted = {**batch, "labels": batch["labels"].clone()}
    wanted["labels"][:, 1:][~kept] = -100
    found, plain = gradients(joined, batch, **settings), gradients("full", wanted)
    share = int(kept.sum()) / max(int(kept.sum()), 0.5 * count)
    for name, one in plain.items():
        torch.testing.assert_close(found[name], share * one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_dropped_tokens_have_no_gradient_and_half_of_all_divide_at_least() -> None:
    batch = texts(llama())
    found = gradients("error-norm-truncation+full", batch, threshold=1e-6)
    assert all(not one.any() for one in found.values())


def test_the_share_that_it_would_drop_is_measured_while_scoring() -> None:
    model, batch = sharp(llama()).eval(), texts(llama(), rows=6)
    units = chosen("error-norm-truncation+full", threshold=1.2)
    techniques.apply_techniques(units, model, LANGUAGE, 0)
    with torch.no_grad(), collect_metrics(units, model) as figures:
        begin_step(units, model, batch, 1.0)
        LANGUAGE.score_batch(model, batch, None)
        found = figures()
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    wanted = float((one_hot_norms(logits, batch["labels"][:, 1:]) > 1.2).float().mean())
    assert 0 < wanted < 1
    assert found == {"error_norm_share": pytest.approx(wanted)}
    assert not model._forward_hooks


def test_merging_restores_the_loss_of_the_model() -> None:
    model = llama()
    plain = model.loss_function
    units = chosen("error-norm-truncation+full")
    techniques.apply_techniques(units, model, LANGUAGE, 0)
    assert model.loss_function is not plain
    techniques.merge_into_weights(units, model)
    assert model.loss_function is plain


def test_what_it_cannot_filter_is_refused() -> None:
    with pytest.raises(ModelError, match="BertForSequenceClassification is no causal language model; remove"):
        techniques.apply_techniques(chosen("error-norm-truncation+full"), FAMILIES["bert"].model(), TEXT, 0)
    with pytest.raises(RecipeError, match="two rules for the same tokens"):
        chosen("error-norm-truncation+full", threshold=1.3, fraction=0.1)
    with pytest.raises(ModelError, match="preference has a loss of its own"):
        techniques.apply_techniques(chosen("error-norm-truncation+full"), llama(), get_task("preference"), 0)
    model = llama()
    model.forward = lambda **given: given
    with pytest.raises(ModelError, match="computes its loss by itself"):
        techniques.apply_techniques(chosen("error-norm-truncation+full"), model, get_task("text-generation"), 0)
