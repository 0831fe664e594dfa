import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from fedtune.errors import ModelError
from fedtune.tasks import get_task
from fedtune.techniques import begin_round
from fedtune.techniques.fused_loss.fused_cross_entropy import DeferredHead
from fedtune.training import EvaluatedModel, evaluate_model
from tests.families import FAMILIES, LANGUAGE_FAMILIES
from tests.technique_steps import LANGUAGE, TEXT, chosen, gradients, logits, shake, shared
from tests.tiny import bert, few_texts, llama, llama_classifier, texts


@pytest.mark.parametrize("family", LANGUAGE_FAMILIES)
@pytest.mark.parametrize("technique", ["full", "lora"])
def test_a_step_follows_the_plain_gradients(family: str, technique: str) -> None:
    usual, model, batch = FAMILIES[family].model(), FAMILIES[family].model(), FAMILIES[family].make_batch()
    shake(usual, shared(technique, usual, LANGUAGE))
    shake(model, shared(f"fused-cross-entropy+{technique}", model, LANGUAGE, chunk=4))
    batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] % 3 == 0, -100)
    wanted, _ = gradients(usual, batch)
    found, _ = gradients(model, batch)
    assert found.keys() == wanted.keys()
    scale = max(gradient.abs().max() for gradient in wanted.values())
    assert all((found[name] - wanted[name]).abs().max() < 2e-6 * scale for name in wanted)


def test_tied_embeddings_gather_both_gradients() -> None:
    usual, model = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    shared("full", usual, LANGUAGE)
    names = shared("full+fused-cross-entropy", model, LANGUAGE)
    assert "lm_head.weight" not in names
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    batch = texts(model)
    wanted, found = (gradients(one, batch)[0]["model.embed_tokens.weight"] for one in (usual, model))
    torch.testing.assert_close(found, wanted)


def test_gradients_add_up_over_three_steps() -> None:
    usual, model = llama(tie_word_embeddings=True), llama(tie_word_embeddings=True)
    shared("full", usual, LANGUAGE)
    shared("fused-cross-entropy+full", model, LANGUAGE, chunk=5)
    for one in (usual, model):
        one.train()
        for step in range(3):
            (one(**texts(one, seed=step)).loss / 3).backward()
    for (_, wanted), (_, found) in zip(usual.named_parameters(), model.named_parameters(), strict=True):
        assert wanted.grad is not None
        assert found.grad is not None
        torch.testing.assert_close(found.grad, wanted.grad)


def test_scoring_and_generation_see_plain_logits() -> None:
    usual, model = llama(), llama()
    shared("fused-cross-entropy+full", model, LANGUAGE)
    batch = texts(model)
    assert torch.equal(logits(model, batch), logits(usual, batch))
    data = few_texts(language=True)
    assert evaluate_model(EvaluatedModel(model, LANGUAGE, 4), data) == evaluate_model(
        EvaluatedModel(usual, LANGUAGE, 4), data
    )
    model.train()
    unlabelled = {name: tensor for name, tensor in batch.items() if name != "labels"}
    assert torch.equal(model(**unlabelled).logits, usual(**unlabelled).logits)
    generated = [one.eval().generate(batch["input_ids"], max_new_tokens=3, do_sample=False) for one in (model, usual)]
    assert torch.equal(*generated)


def test_a_training_step_hands_out_no_hidden_states_as_logits() -> None:
    model = llama()
    shared("fused-cross-entropy+full", model, LANGUAGE)
    out = model.train()(**texts(model))
    assert out.logits is None
    assert "logits" not in out


def test_a_step_that_fails_leaves_a_plain_head() -> None:
    model = llama()
    shared("fused-cross-entropy+full", model, LANGUAGE)
    batch = texts(model)
    wanted = logits(model, batch)
    with pytest.raises(IndexError):
        model.train()(**{**batch, "input_ids": batch["input_ids"] + 1000})
    head = model.get_output_embeddings()
    assert (head.is_deferred, head.hidden_states) == (False, None)
    assert torch.equal(logits(model, batch), wanted)


def test_applying_draws_nothing_and_leaves_the_mode_alone() -> None:
    model = FAMILIES["gpt2"].model()
    state = torch.get_rng_state()
    for mode in (True, False):
        model.train(mode)
        shared("fused-cross-entropy+full", deepcopy(model), LANGUAGE)
        assert model.training == mode
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("joined", ["fused-cross-entropy+lora", "lora+fused-cross-entropy"])
def test_it_trains_and_names_what_the_technique_beside_it_does(joined: str) -> None:
    assert shared(joined, llama(), LANGUAGE) == shared("lora", llama(), LANGUAGE)


@pytest.mark.parametrize("copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_takes_the_same_step_on_its_own(copy: Any) -> None:
    model = FAMILIES["gpt2"].model()
    techniques = chosen("fused-cross-entropy+lora")
    names = shared("fused-cross-entropy+lora", model, LANGUAGE)
    shake(model, names)
    begin_round(techniques, model, 1)
    model.share_memory()
    other = copy(model)
    batch = FAMILIES["gpt2"].make_batch()
    wanted, kept = gradients(model, batch)
    found, kept_too = gradients(other, batch)
    assert (found.keys(), kept_too) == (wanted.keys(), kept)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert other.get_output_embeddings() is not model.get_output_embeddings()
    assert isinstance(other.get_output_embeddings(), DeferredHead)


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_folded_model_is_plain_again(with_bias: bool) -> None:
    model = llama()
    model.lm_head = nn.Linear(16, 40, bias=with_bias)
    before = vars(model).keys() | set()
    state = model.state_dict()
    [technique, _] = chosen("fused-cross-entropy+full")
    technique.rewrite_model(model, LANGUAGE, 0)
    batch = texts(model)
    technique.merge_into_weights(model)
    assert type(model.lm_head) is nn.Linear
    assert vars(model).keys() == before
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.train()(**batch).logits.shape == (4, 8, 40)


SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "use_cache": False,
}


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=1, head_dim=8, final_logit_softcapping=30.0))


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0))


def bart() -> PreTrainedModel:
    size: dict[str, Any] = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    return BartForCausalLM(BartConfig(vocab_size=40, d_model=16, **size, pad_token_id=0, use_cache=False))


@pytest.mark.parametrize("build", [gemma2, granite, bart])
def test_a_model_that_does_more_with_its_logits_is_refused_before_training(build: Any) -> None:
    model = build().eval()
    with pytest.raises(ModelError, match=r"^\w+ForCausalLM uses its logits for more than their cross-entropy; "):
        shared("fused-cross-entropy+full", model, LANGUAGE)
    assert not model.training


@pytest.mark.parametrize("model", [bert(), llama_classifier(), nn.Sequential(nn.Linear(2, 2))])
def test_a_model_without_a_vocabulary_is_refused(model: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"has no head over a vocabulary; remove the technique fused-cross-entropy$"):
        shared("fused-cross-entropy+full", model, TEXT)


def test_a_head_that_is_no_plain_linear_layer_is_refused() -> None:
    model = llama()
    model.lm_head = nn.Sequential(nn.Linear(16, 40))
    with pytest.raises(
        ModelError, match="the head of LlamaForCausalLM is a Sequential; fused-cross-entropy needs a plain one"
    ):
        shared("fused-cross-entropy+full", model, LANGUAGE)


def test_a_task_with_a_loss_of_its_own_is_refused_because_nothing_would_be_saved() -> None:
    model = llama()
    with pytest.raises(ModelError, match=r"^preference computes a loss of its own from all logits, so fused-cross"):
        shared("fused-cross-entropy+full", model, get_task("preference"))
    assert type(model.lm_head) is nn.Linear
