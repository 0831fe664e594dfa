"""Gradients of reversible blocks are those of stored activations, to the bit."""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import PreTrainedModel

from fedtune import models
from fedtune.errors import ModelError
from fedtune.recipe.schema import ModelSettings
from fedtune.techniques import apply_techniques, list_trainable_tensors
from fedtune.techniques._loss_terms import add_loss_term, collect_loss_terms
from fedtune.techniques.meft._reversible import run_reversible
from fedtune.training.step_loss import compute_step_loss
from tests.meft_models import FAMILIES, VARIANTS, a_batch, equal, stack_of, twins
from tests.technique_steps import LANGUAGE, TEXT, chosen, gradients, logits, shake
from tests.tiny import llama


def task_of(family: str) -> dict[str, Tensor]:
    return a_batch(FAMILIES[family][1])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_variant_with_dropout_and_padding(family: str, variant: str) -> None:
    model, stored = twins(family, variant=variant)
    found, kept = gradients(model, task_of(family))
    wanted, kept_stored = gradients(stored, task_of(family))
    assert equal(found, wanted)
    assert all(wanted[name].abs().sum() > 0 for name in wanted)
    assert set(found) == set(list_trainable_tensors(model))
    assert kept < kept_stored / 4


@pytest.mark.parametrize("joined", ["meft+lora", "lora+meft", "meft+full", "bias+meft", "meft+bias", "head-only+meft"])
def test_whatever_else_is_trained_inside_the_blocks(joined: str) -> None:
    model, stored = twins("bert", joined)
    found, _ = gradients(model, task_of("bert"))
    wanted, _ = gradients(stored, task_of("bert"))
    assert equal(found, wanted)
    assert any(".adapters." in name for name in found)
    other = {"lora": ".lora_B.", "full": "query.weight", "bias": "LayerNorm.bias", "head-only": "classifier."}
    assert any(other[joined.replace("meft", "").strip("+")] in name for name in found)


@pytest.mark.parametrize("joined", ["qlora+meft", "meft+qlora"])
def test_a_four_bit_base(joined: str, tmp_path: Path) -> None:
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    applied = chosen(joined)
    [quantisation] = [found for one in applied if (found := one.make_quantisation_config()) is not None]
    model = models.load_model(ModelSettings(source=f"path:{tmp_path}"), LANGUAGE, (), seed=0, quantisation=quantisation)
    assert isinstance(model, PreTrainedModel)
    stored = deepcopy(model)
    twin = [made for one in applied if (made := one.make_reference()) is not None]
    found = []
    for one, units in ((model, applied), (stored, twin)):
        shake(one, apply_techniques(units, one, LANGUAGE, 0))
        logits(one, a_batch(LANGUAGE))  # scoring must change nothing
        found.append(gradients(one, a_batch(LANGUAGE))[0])
    assert equal(*found)
    assert any(isinstance(layer, Linear4bit) for layer in model.modules())
    assert sum(".lora_" in name for name in found[0]) == 2 * 7
    assert all(gradient.abs().sum() > 0 for gradient in found[0].values())


@pytest.mark.parametrize("merge", ["main", "mean"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_merging_by_the_mean_and_running_in_pieces(merge: str, pieces: int) -> None:
    for family in ("bert", "llama", "qwen2-sliding"):
        model, stored = twins(family, merge=merge, pieces=pieces)
        assert equal(gradients(model, task_of(family))[0], gradients(stored, task_of(family))[0])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_bfloat16_models_and_autocast(family: str) -> None:
    model, stored = (one.bfloat16() for one in twins(family))
    assert equal(gradients(model, task_of(family))[0], gradients(stored, task_of(family))[0])
    model, stored = twins(family)
    plain, _ = gradients(stored, task_of(family))
    stored.zero_grad()
    found, wanted = autocast_gradients(model, family), autocast_gradients(stored, family)
    assert equal(found, wanted)
    assert not equal(found, plain)


def autocast_gradients(model: PreTrainedModel, family: str) -> dict[str, Tensor]:
    """The backward pass runs outside, as it does in user's loops."""
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(**task_of(family)).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [(0,), (1,), (2,), (0, 1, 2)])
def test_the_streams_may_go_back_to_the_grid_behind_any_block(variant: str, cuts: tuple[int, ...]) -> None:
    model, stored = cut(*twins("llama", variant=variant), cuts=cuts)
    assert equal(gradients(model, task_of("llama"))[0], gradients(stored, task_of("llama"))[0])


def cut(*models: PreTrainedModel, cuts: tuple[int, ...]) -> tuple[PreTrainedModel, ...]:
    for model in models:
        plan = stack_of(model).plan
        object.__setattr__(plan, "cuts", cuts)
    return models


def test_the_network_and_its_loss_are_the_same_whether_activations_are_stored_or_not() -> None:
    for variant in VARIANTS:
        model, stored = twins("bert", variant=variant)
        for mode in (True, False):
            torch.manual_seed(3)
            found = model.train(mode)(**task_of("bert")).logits
            torch.manual_seed(3)
            assert torch.equal(found, stored.train(mode)(**task_of("bert")).logits)
        with torch.no_grad():
            assert torch.equal(model(**task_of("bert")).logits, found)


def test_two_micro_batches_add_up_to_one_batch() -> None:
    model, _ = twins("bert")
    model.eval()  # dropout would differ
    batch = a_batch(TEXT, rows=8)
    model(**batch).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for half in (slice(4), slice(4, 8)):
        (model(**{name: tensor[half] for name, tensor in batch.items()}).loss / 2).backward()
    for name, gradient in whole.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-7)


def test_two_forward_passes_before_their_backward_passes() -> None:
    model, stored = twins("bert")
    first, second = a_batch(TEXT), a_batch(TEXT, rows=6, length=5)
    found = []
    for one in (model, stored):
        torch.manual_seed(3)
        losses = [one.train()(**batch).loss for batch in (first, second)]
        losses[0].backward()
        losses[1].backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert equal(*found)


def test_autograd_grad_gives_what_backward_gives_and_may_be_asked_twice() -> None:
    model, _ = twins("llama")
    wanted, _ = gradients(model, a_batch(LANGUAGE))
    wanted = {name: gradient.clone() for name, gradient in wanted.items()}
    torch.manual_seed(3)
    loss = model(**a_batch(LANGUAGE)).loss
    parameters = [model.get_parameter(name) for name in wanted]
    for _ in range(2):
        found = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(found, wanted.values(), strict=True))


def test_the_backward_pass_leaves_the_generator_alone() -> None:
    model, _ = twins("bert")
    loss = model.train()(**a_batch(TEXT)).loss
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_each_step_draws_its_own_dropout() -> None:
    model, _ = twins("bert")
    model.train()
    torch.manual_seed(3)
    first, second = (model(**a_batch(TEXT)).loss for _ in range(2))
    assert not torch.equal(first, second)


def test_frozen_weights_get_no_gradient_and_keep_their_bytes() -> None:
    model, _ = twins("bert")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    gradients(model, a_batch(TEXT))
    for name, before in frozen.items():
        assert model.get_parameter(name).grad is None
        assert torch.equal(model.get_parameter(name), before)


def test_a_pickled_copy_has_the_same_gradients() -> None:
    model, _ = twins("llama")
    copy = pickle.loads(pickle.dumps(model))
    copy.share_memory()
    assert equal(gradients(copy, a_batch(LANGUAGE))[0], gradients(model, a_batch(LANGUAGE))[0])


def emits(module: torch.nn.Module, args: object, out: Tensor) -> None:
    add_loss_term(0.1 * out.pow(2).mean())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_terms_of_the_loss_that_blocks_add_are_differentiated_once(family: str) -> None:
    model, stored = twins(family)
    plain, _ = gradients(stored, task_of(family))
    found = []
    for one in (model, stored):
        for name, module in one.named_modules():
            if name.endswith(("intermediate", "mlp", "self", "self_attn.v_proj")):
                module.register_forward_hook(emits_first if name.endswith("self") else emits)
        one.zero_grad()
        torch.manual_seed(3)
        loss = compute_step_loss(TEXT if family == "bert" else LANGUAGE, one.train(), task_of(family))
        loss.backward()
        found.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert equal(*found)
    assert not equal(found[0], plain)


def emits_first(module: torch.nn.Module, args: object, out: tuple[Tensor, ...]) -> None:
    emits(module, args, out[0])


def test_terms_are_not_kept_while_nobody_asks() -> None:
    model, _ = twins("bert")
    with collect_loss_terms() as terms:
        model.train()(**a_batch(TEXT))
    assert not terms


def test_what_is_passed_beside_the_hidden_states_must_not_want_gradients() -> None:
    model, _ = twins("llama")
    stack = stack_of(model)
    hidden, wanting = torch.randn(1, 4, 16), torch.randn(1, 1, 4, 4, requires_grad=True)
    with pytest.raises(ModelError, match="cannot give gradients to what is passed to its blocks"):
        run_reversible(stack, hidden, [{"attention_mask": wanting}] * len(stack.blocks))


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("merge", ["main", "mean"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_function_passes_gradcheck_in_double_precision(variant: str, merge: str) -> None:
    model, _ = (one.double() for one in twins("bert", variant=variant, merge=merge, mode="float", factor=0.5, rank=2))
    stack, calls = stack_of(model.eval()), [{"attention_mask": None}] * 3
    adapters = [p for block in stack.blocks for p in block.parameters() if p.requires_grad]
    hidden = torch.randn(1, 2, 16, dtype=torch.float64, requires_grad=True)
    with silent():
        assert torch.autograd.gradcheck(
            lambda h, *_: run_reversible(stack, h, calls), (hidden, *adapters), fast_mode=True
        )


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def test_float_mode_in_double_precision_is_close() -> None:
    model, stored = (one.double() for one in twins("bert", variant="meft1", mode="float", factor=0.1))
    with silent():
        found, _ = gradients(model, a_batch(TEXT))
    assert 0 < largest_error(found, gradients(stored, a_batch(TEXT))[0]) < 1e-10


def test_published_float_mode_is_wrong_where_it_is_deep_and_says_so_once() -> None:
    """The negative control: the same comparison that exact mode passes to the bit."""
    model, stored = twins("deep-bert", variant="meft3", mode="float", factor=0.1)
    with pytest.warns(UserWarning, match=r"rebuilt the input of its first block with a relative error of \d"):
        found, _ = gradients(model, a_batch(TEXT))
    assert largest_error(found, gradients(stored, a_batch(TEXT))[0]) > 0.01
    gradients(model, a_batch(TEXT))  # a second warning would be an error
    exact, stored = twins("deep-bert", variant="meft3")
    assert equal(gradients(exact, a_batch(TEXT))[0], gradients(stored, a_batch(TEXT))[0])


def test_blocks_that_compute_something_else_the_second_time_are_found_out() -> None:
    model, _ = twins("bert")
    torch.manual_seed(3)
    loss = model.train()(**a_batch(TEXT)).loss
    with torch.no_grad():
        stack_of(model).blocks[1].get_parameter("output.dense.bias")[0] += 1e-3
    with pytest.raises(ModelError, match="gave other bits when they ran again, so their gradients would be wrong"):
        loss.backward()
