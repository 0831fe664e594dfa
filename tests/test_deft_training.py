import pickle
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from fedtune import techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import Recipe, Unit
from fedtune.tasks import Task
from fedtune.techniques import Technique
from fedtune.techniques.deft.deft import get_probes
from fedtune.training import ClientRound
from fedtune.training.local_training import train_local_model
from fedtune.training.model_state import get_model_state
from tests.deft_models import opt, relu_bert, t5
from tests.deft_twin import deft, labelled, padded, step_gradients, task_of
from tests.technique_steps import LANGUAGE, TEXT
from tests.tiny import a_training_recipe, bert, few_texts, llama

_EPS = 1e-2
_CASES: list[tuple[Callable[..., PreTrainedModel], Task]] = [(bert, TEXT), (opt, LANGUAGE), (llama, LANGUAGE)]


def _train(
    model: PreTrainedModel, chosen: tuple[Technique, ...], names: list[str], recipe: Recipe
) -> dict[str, torch.Tensor]:
    return train_local_model(
        ClientRound(model, chosen, recipe, few_texts(), np.arange(12), 1, 0), get_model_state(model, names)
    ).delta


def test_without_alpha_twenty_steps_end_with_the_same_bits() -> None:
    outcomes = []
    for chosen in (deft("lora", alpha=0.0), techniques.build_techniques([Unit(name="lora")])):
        model = bert()
        names = techniques.apply_techniques(chosen, model, TEXT, 0)
        recipe = a_training_recipe(local_steps=20)
        outcomes.append(_train(model, chosen, names, recipe))
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[1])
    assert outcomes[0].keys() == outcomes[1].keys()


def test_only_what_the_other_technique_trains_has_a_gradient_and_the_base_stays() -> None:
    model = bert()
    chosen = deft("lora")
    names = techniques.apply_techniques(chosen, model, TEXT, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name not in names}
    _, found = step_gradients(model, chosen, labelled(model))
    assert found.keys() <= set(names)
    _train(model, chosen, names, a_training_recipe(local_steps=3))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_nothing_grows_over_steps_and_scoring_emits_nothing() -> None:
    model = bert()
    chosen = deft("lora")
    techniques.apply_techniques(chosen, model, TEXT, 0)
    batch = labelled(model)
    for _ in range(30):
        step_gradients(model, chosen, batch)
    model.train()
    with techniques.collect_loss_terms() as terms:
        model(**batch)
    assert len(terms) == 2
    model.eval()
    with techniques.collect_loss_terms() as terms, torch.no_grad():
        model(**batch)
    assert terms == []
    assert all(probe.tally is None and probe.sample is None for probe in get_probes(model))


@pytest.mark.parametrize("build", [bert, opt, llama])
def test_the_model_survives_pickling_and_deep_copies(build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    chosen = deft("lora", alpha=2.0)
    techniques.apply_techniques(chosen, model, task_of(model), 0)
    model.share_memory()
    batch = padded(labelled(model), 8, 5, 2, 7)
    wanted = step_gradients(model, chosen, batch)
    for copy in (pickle.loads(pickle.dumps(model)), deepcopy(model)):
        loss, found = step_gradients(copy, chosen, batch)
        assert loss == wanted[0]
        assert all(torch.equal(found[name], gradient) for name, gradient in wanted[1].items())


def test_epsilon_is_annealed_geometrically_over_the_run() -> None:
    model = bert()
    chosen = deft("lora", eps=1e-6, eps_start=1e-2)
    techniques.apply_techniques(chosen, model, TEXT, 0)
    seen = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        techniques.begin_step(chosen, model, labelled(model), progress)
        seen.append(get_probes(model)[0].step.eps)
    assert seen == pytest.approx([1e-2, 1e-3, 1e-4, 1e-6])


def test_two_stacks_press_twice_as_hard_as_one() -> None:
    model = t5(decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, num_labels=3, dropout_rate=0.0)
    chosen = deft("full", alpha=1.0, eps=1e-12)
    techniques.apply_techniques(chosen, model, TEXT, 0)
    with techniques.collect_metrics(chosen, model) as figures, torch.no_grad():
        batch = labelled(model)
        batch["input_ids"] = batch["input_ids"].clamp(min=2)
        batch["input_ids"][:, -1] = 1
        techniques.begin_step(chosen, model.eval(), batch, 1.0)
        plain = float(model(**batch).loss)
        shares = figures()
    loss, _ = step_gradients(model, chosen, batch)
    assert loss - plain == pytest.approx(shares["density_encoder"] + shares["density_decoder"], abs=1e-3)


def test_scale_of_a_gated_mlp_is_no_way_to_a_smaller_density() -> None:
    densities = []
    for factor in (1.0, 0.1):
        model = llama()
        model.get_parameter("model.layers.0.mlp.up_proj.weight").data.mul_(factor)
        chosen = deft("full", eps=1e-2)
        techniques.apply_techniques(chosen, model, LANGUAGE, 0)
        step_gradients(model, chosen, labelled(model))
        densities.append(get_probes(model)[0].density)
    assert densities[1] == pytest.approx(densities[0], rel=1e-4)


def test_deft_trains_nothing_alone() -> None:
    with pytest.raises(RecipeError, match="deft trains nothing; add full, lora, bias or head-only"):
        deft()


def test_a_batch_that_is_not_the_one_begun_with_is_refused() -> None:
    model = bert()
    chosen = deft("lora")
    techniques.apply_techniques(chosen, model, TEXT, 0)
    techniques.begin_step(chosen, model, labelled(model), 0.0)
    with pytest.raises(ModelError, match="deft sees 40 tokens where the step began with 32; begin each step anew"):
        model.train()(**labelled(model, rows=5))


def test_density_falls_in_training_with_relu_and_costs_little_of_the_fit() -> None:
    """T9 in small: the same steps with and without the term."""
    shares = {}
    for alpha in (0.0, 1.0):
        model = relu_bert()
        chosen = deft("full", alpha=alpha)
        names = techniques.apply_techniques(chosen, model, TEXT, 0)
        _train(model, chosen, names, a_training_recipe(local_steps=60, lr=3e-3))
        batch = few_texts().make_batch(range(12))
        model.eval()
        techniques.begin_step(chosen, model, batch, 1.0)
        with techniques.collect_metrics(chosen, model) as figures, torch.no_grad():
            model(**batch)
            shares[alpha] = figures()["density"]
    assert shares[1.0] < 0.5 * shares[0.0]


def test_gelu_hardly_gets_an_exact_zero_in_a_short_run() -> None:
    """T10: what the exact count finds would be a fault of the count."""
    torch.manual_seed(0)
    assert BertConfig().hidden_act == "gelu"
    model = bert()
    assert isinstance(model, BertForSequenceClassification)
    chosen = deft("lora", alpha=1.0)
    names = techniques.apply_techniques(chosen, model, TEXT, 0)
    _train(model, chosen, names, a_training_recipe(local_steps=60, lr=1e-3))
    batch = few_texts().make_batch(range(12))
    model.eval()
    techniques.begin_step(chosen, model, batch, 1.0)
    with techniques.collect_metrics(chosen, model) as figures, torch.no_grad():
        model(**batch)
        assert figures()["density"] > 0.999
