from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedtune import techniques
from fedtune.memory import StorageMeter
from fedtune.recipe.schema import Unit
from fedtune.tasks import Task
from fedtune.techniques import Technique
from fedtune.techniques.deft.deft import get_probes
from fedtune.training.step_loss import compute_step_loss
from tests.deft_models import opt, relu_bert, t5
from tests.deft_twin import deft, labelled, padded, slow_loss, step_gradients, task_of
from tests.technique_steps import LANGUAGE, TEXT, shake
from tests.tiny import bert, llama, llama_classifier

_EPS = 1e-2
_CASES: list[tuple[Callable[..., PreTrainedModel], Task]] = [(bert, TEXT), (opt, LANGUAGE), (llama, LANGUAGE)]


def _with(names: Sequence[str], *builds: Any) -> list[tuple[Any, str]]:
    """Every pair, but for biases of a Llama, which has none."""
    return [
        (build, name) for build, name in product(builds, names) if "llama" not in build.__name__ or "bias" not in name
    ]


ORDERS = ("full+deft", "lora+deft", "deft+lora", "bias+deft", "lora+deft+gradient-checkpointing")


@pytest.mark.parametrize(("build", "order"), _with(ORDERS, bert, relu_bert, opt, llama))
def test_loss_and_gradients_are_those_of_the_plain_twin(build: Callable[[], PreTrainedModel], order: str) -> None:
    model = build()
    chosen = techniques.build_techniques(
        [Unit(name=n, settings={"alpha": 3.0, "eps": _EPS} if n == "deft" else {}) for n in order.split("+")]
    )
    plain = tuple(technique for technique in chosen if technique.name not in ("deft", "gradient-checkpointing"))
    twin = deepcopy(model)
    names = techniques.apply_techniques(chosen, model, task_of(model), 0)
    assert techniques.apply_techniques(plain, twin, task_of(model), 0) == names
    for one in (model, twin):
        shake(one, names)
        for name in names:
            one.get_parameter(name).requires_grad_(True)
    batch = padded(labelled(model), 8, 5, 2, 7)
    loss, found = step_gradients(model, chosen, batch)
    twin.train()
    torch.manual_seed(3)
    wanted = slow_loss(twin, batch, 3.0, _EPS, gated=build is llama)
    wanted.backward()
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name in names:
        torch.testing.assert_close(found[name], twin.get_parameter(name).grad, rtol=2e-4, atol=1e-6)


def test_a_product_with_dropout_in_it_is_followed_as_it_is() -> None:
    """The gated T5 drops out between product and narrowing layer, so that the factors do not give it again."""
    words = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "num_labels": 3}
    torch.manual_seed(0)
    model = t5(feed_forward_proj="gated-gelu", dropout_rate=0.3, **words)
    twin = deepcopy(model)
    chosen = deft("full", alpha=3.0, eps=_EPS)
    techniques.apply_techniques(chosen, model, TEXT, 0)
    techniques.apply_techniques(chosen[:1], twin, TEXT, 0)
    batch = labelled(model)
    batch["input_ids"] = batch["input_ids"].clamp(min=2)
    batch["input_ids"][:, -1] = 1
    loss, found = step_gradients(model, chosen, batch)
    twin.train()
    torch.manual_seed(3)
    wanted = slow_loss(twin, batch, 2 * 3.0, _EPS, gated=True)  # two stacks, of which each has weight 1
    wanted.backward()
    assert [probe.can_recompute for probe in get_probes(model)] == [False] * 4
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, twin.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "beside"),
    _with(("full", "lora", "bias"), relu_bert, bert, opt, llama, llama_classifier),
)
def test_no_byte_more_is_kept_for_the_backward_pass(build: Callable[[], PreTrainedModel], beside: str) -> None:
    kept = {}
    for name, chosen in {"plain": techniques.build_techniques([Unit(name=beside)]), "deft": deft(beside)}.items():
        model = build()
        techniques.apply_techniques(chosen, model, task_of(model), 0)
        techniques.begin_round(chosen, model, 1)  # B alone is trained: no narrowing layer keeps its input
        batch = padded(labelled(model, 16, 24), *[20] * 16)
        model.train()
        techniques.begin_step(chosen, model, batch, 1.0)
        with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
            loss = compute_step_loss(task_of(model), model, batch)
            kept[name] = meter.current_bytes
        loss.backward()
    tokens = 16 * 24
    assert kept["deft"] - kept["plain"] <= 2 * 8 * tokens  # a mask and a few scalars, no activation of 32 tokens


@pytest.mark.parametrize("joined", ["meft+deft", "lora+meft+deft", "lora+deft+selective-checkpointing", "deft+meft"])
@pytest.mark.parametrize("settings", [{}, {"skip": {"gamma": 0.5}}], ids=["plain", "skip"])
@pytest.mark.parametrize("build", [bert, llama])
def test_blocks_that_run_again_give_the_gradients_of_stored_activations(
    build: Callable[[], PreTrainedModel], settings: dict[str, Any], joined: str
) -> None:
    own = {"deft": {"alpha": 3.0, "eps": _EPS, **settings}}
    chosen = techniques.build_techniques([Unit(name=name, settings=own.get(name, {})) for name in joined.split("+")])
    twins = [technique.make_reference() for technique in chosen]
    stored = tuple(twin for twin in twins if twin is not None)
    found, wanted = (_shaken_gradients(build(), techniques_of) for techniques_of in (chosen, stored))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def _shaken_gradients(model: PreTrainedModel, chosen: tuple[Technique, ...]) -> dict[str, torch.Tensor]:
    names = techniques.apply_techniques(chosen, model, task_of(model), 0)
    shake(model, [name for name in names if "theta" not in name])
    return step_gradients(model, chosen, padded(labelled(model), 8, 5, 2, 7))[1]
