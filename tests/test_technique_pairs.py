"""Any two techniques either train together, exactly, or are refused before training with the reason.

``SETTINGS`` drives every technique of the package, so a new one is tested in all its pairs as soon as its file exists.
"""

import pickle
from collections.abc import Sequence
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtune import models, techniques
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe import unit_registry
from fedtune.recipe.schema import ModelSettings, Unit
from fedtune.techniques import Technique, begin_round, begin_step
from fedtune.techniques.badam import Badam
from fedtune.techniques.compressed._layer_inputs import RECOMPUTED
from fedtune.techniques.compressed.compact import Compact
from fedtune.techniques.low_rank._task_pairs import CONFLICTS
from fedtune.training import (
    ClientRound,
    LocalTrainingResult,
    compute_step_loss,
    get_model_state,
    set_train_mode,
    train_local_model,
)
from tests.families import FAMILIES
from tests.technique_steps import shake
from tests.tiny import a_training_recipe, few_texts

SETTINGS: dict[str, dict[str, Any]] = {
    "activation-pruning": {"prune": 0.0},  # all else has other gradients, which its own tests are about
    "chunked-mlp": {"chunk_size": 5},
    "compact": {"reduction": 2},
    "division": {"min_bytes": 1 << 30},  # with these two as well
    "int8-activations": {"min_bytes": 1 << 30},
    "dynamic-pruning": {"density": 0.9, "every": 1},
    "error-norm-truncation": {"threshold": 0.99},
    "fused-cross-entropy": {"chunk": 5},
    "fedkseed": {"seeds": 30},
    "lora": {"rank": 2, "dropout": 0.1},
    "inf-lora": {"rank": 2},
    "meft": {"rank": 2},
    "o-lora": {"rank": 2},
    "offload": {"min_bytes": 256},
    "qlora": {"rank": 2},
    "selective-checkpointing": {"terms": 8},
    "shifted-attention": {"group_size": 4},
    "token-drop": {"kept_fraction": 1.0},
}
"""What differs from the default, so that a tiny model shows it."""

BASES = ("bert", "opt")
"""A classifier and a language model, both with biases and dropout."""

NAMES = unit_registry.list_unit_names("fedtune.techniques")
PAIRS = [f"{one}+{other}" for one, other in combinations(NAMES, 2)]

ZEROTH_ORDER = ("fedkseed", "mezo")


def get_technique(name: str) -> type[Technique]:
    found = unit_registry.import_unit_class("fedtune.techniques", name, "here")
    assert issubclass(found, Technique)
    return found


CLASHES = {
    **{
        "+".join(sorted((name, other))): reason
        for name in ("inf-lora", "o-lora")
        for other, reason in CONFLICTS.items()
    },
    "inf-lora+o-lora": "both add a low-rank pair for each task",
    **{
        "+".join(sorted((name, "dynamic-pruning"))): "a mask needs trained weights"
        for name in ("lora", "meft", "qlora")
    },
    **{
        "+".join(sorted((name, "dynamic-pruning"))): "all weights are trained under masks"
        for name in ("bias", "head-only", "full", "last-blocks", "mobiletl", "batch-norm", "tinytl")
    },
    **{
        "+".join(sorted((name, other))): reason
        for name in ("division", "int8-activations")
        for other, reason in RECOMPUTED.items()
    },
    **{"+".join(sorted(("compact", name))): reason for name, reason in Compact.conflicts_with.items()},
    **{
        "+".join(sorted((name, other))): f"{name} runs no backward pass, which {other} changes"
        for name in ZEROTH_ORDER
        for other in unit_registry.list_unit_names("fedtune.techniques")
        if not get_technique(other).fits_zeroth_order and other not in ZEROTH_ORDER
    },
    "fedkseed+mezo": "both take the steps of a round",
    "badam+fedkseed": "scalars belong to the same tensors in all rounds, and badam trains others each round",
    **{
        "+".join(sorted(("fedkseed", name))): "lora trains others each round; set trained_factors: b-only"
        for name in ("chunked-mlp", "fused-cross-entropy", "lora", "qlora", "shifted-attention")
    },
    "deft+token-drop": "densities are measured over all tokens of a step at once",
    "meft+token-drop": "reversible blocks do not run on a part of the tokens",
    "shifted-attention+token-drop": "both decide which tokens attend to each other",
    **{"+".join(sorted(("badam", name))): reason for name, reason in Badam.conflicts_with.items()},
    "division+int8-activations": "both change the form of the same inputs",
    "chunked-mlp+deft": "densities are measured over all tokens of a step at once",
    "bias+head-only": "the head is already trained with the biases",
    "bias+full": "full trains biases among all the rest",
    "bias+last-blocks": "it trains biases below the last blocks too",
    "bias+mobiletl": "its frozen part has no gradients",
    "batch-norm+bias": "the shifts are already trained with the scales",
    "bias+tinytl": "tinytl trains biases itself",
    "gradient-checkpointing+last-blocks": "statistics would count each batch twice",
    "batch-norm-statistics+gradient-checkpointing": "recomputed blocks would count their batch twice",
    "gradient-checkpointing+meft": "reversible blocks already store no activations",
    "gradient-checkpointing+mobiletl": "statistics would count each batch twice",
    "gradient-checkpointing+selective-checkpointing": "both decide which activations the same blocks store",
    "gradient-checkpointing+offload": "recomputed blocks keep no activations that could be written to a file",
    "meft+offload": "reversible blocks keep no activations that could be written to a file",
    "offload+selective-checkpointing": "it decides which activations the same blocks store",
    "full+head-only": "full trains the head among all the rest",
    "head-only+last-blocks": "the head is already trained with the blocks",
    "head-only+lora": "the head is already trained with the low-rank pairs",
    "head-only+mobiletl": "the head is already trained with the blocks",
    "batch-norm+head-only": "the head is already trained with the norms",
    "head-only+qlora": "the head is already trained with the low-rank pairs",
    "head-only+tinytl": "the head is already trained with the branches",
    "full+last-blocks": "full trains the last blocks among all the rest",
    "full+lora": "full trains the weights that lora freezes",
    "full+mobiletl": "its frozen part has no gradients",
    "batch-norm+full": "full trains norms among all the rest",
    "full+qlora": "full trains the weights that qlora freezes",
    "full+tinytl": "full trains the blocks that tinytl freezes",
    "last-blocks+lora": "low-rank pairs hide the convolutions that identify blocks",
    "last-blocks+mobiletl": "both train the last blocks",
    "batch-norm+last-blocks": "it trains norms below the last blocks too",
    "last-blocks+qlora": "low-rank pairs hide the convolutions that identify blocks",
    "last-blocks+tinytl": "it trains branches below the last blocks too",
    "batch-norm-statistics+mobiletl": "its frozen part keeps its statistics",
    "lora+mobiletl": "its frozen part has no gradients",
    "lora+qlora": "both add a low-rank pair to the same layers",
    "lora+tinytl": "low-rank pairs hide the convolutions that identify blocks",
    "meft+selective-checkpointing": "reversible blocks store no activations that could be recomputed",
    "batch-norm+mobiletl": "its frozen part has no gradients",
    "mobiletl+qlora": "its frozen part has no gradients",
    "mobiletl+tinytl": "its frozen part has no gradients",
    "batch-norm+tinytl": "tinytl freezes the scales of norms",
    "qlora+tinytl": "low-rank pairs hide the convolutions that identify blocks",
}
"""Pairs that are refused on any model, and the reason."""

MISFITS = {
    (
        "bert",
        "fused-cross-entropy",
    ): "BertForSequenceClassification has no head over a vocabulary; remove the technique fused-",
    ("bert", "chunked-mlp"): "the blocks of BertForSequenceClassification hold no MLP as a module of its own",
    ("opt", "chunked-mlp"): "the blocks of OPTForCausalLM hold no MLP as a module of its own",
    ("bert", "token-drop"): "BertForSequenceClassification has no blocks of Llama's kind",
    ("opt", "token-drop"): "OPTForCausalLM has no blocks of Llama's kind",
    ("bert", "shifted-attention"): "BertForSequenceClassification is no causal language model",
    ("bert", "error-norm-truncation"): "BertForSequenceClassification is no causal language model",
    ("opt", "head-only"): "trains a new head, but text-generation has none",
    ("bert", "last-blocks"): "BertForSequenceClassification has no inverted residual blocks",
    ("bert", "batch-norm-statistics"): "BertForSequenceClassification has no batch norm; remove batch-norm-statistics",
    ("opt", "batch-norm-statistics"): "OPTForCausalLM has no batch norm; remove batch-norm-statistics",
    ("bert", "mobiletl"): "BertForSequenceClassification has no inverted residual blocks",
    ("bert", "batch-norm"): "BertForSequenceClassification has no batch norms to train",
    ("bert", "tinytl"): "BertForSequenceClassification has no inverted residual blocks",
    ("opt", "last-blocks"): "OPTForCausalLM has no inverted residual blocks",
    ("opt", "mobiletl"): "OPTForCausalLM has no inverted residual blocks",
    ("opt", "batch-norm"): "OPTForCausalLM has no batch norms to train",
    ("opt", "tinytl"): "OPTForCausalLM has no inverted residual blocks",
}
"""Techniques that one of the models cannot carry, and the reason."""


def units(joined: str) -> list[Unit]:
    """The pair with its settings; where neither trains anything, lora does."""
    found = [Unit(name=name, settings=SETTINGS.get(name, {})) for name in joined.split("+")]
    if any(unit_registry.build_unit("fedtune.techniques", unit, "here").selects_trainable_tensors for unit in found):
        return found
    return [*found, Unit(name="lora", settings=SETTINGS["lora"])]


def reason(base: str, joined: str) -> str | None:
    """Why a pair is refused, or None."""
    unfit = [MISFITS[base, name] for name in joined.split("+") if (base, name) in MISFITS]
    return CLASHES.get(joined, "|".join(unfit) or None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bases on disk, whence they are loaded, four-bit or not."""
    made = {base: tmp_path_factory.mktemp(base) for base in BASES}
    for base, folder in made.items():
        FAMILIES[base].model().save_pretrained(folder)
    return made


class Bench:
    """Loads each base once per quantisation and hands out copies with techniques applied."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.loaded: dict[tuple[str, bool], nn.Module] = {}

    def model(self, base: str, chosen: Sequence[Technique]) -> nn.Module:
        found = [made for made in (technique.make_quantisation_config() for technique in chosen) if made is not None]
        key = (base, bool(found))
        if key not in self.loaded:
            task, labels = FAMILIES[base].task, () if base == "opt" else ("a", "b", "c")
            quantisation = found[0] if found else None
            self.loaded[key] = models.load_model(
                ModelSettings(source=f"path:{self.folders[base]}"), task, labels, seed=0, quantisation=quantisation
            )
        return deepcopy(self.loaded[key])

    def chosen(self, base: str, joined: str) -> tuple[nn.Module, list[str], tuple[Technique, ...]]:
        """A model with a pair applied, what the federation shares, and the techniques."""
        chosen = techniques.build_techniques(units(joined))
        return *self.prepared(base, chosen), chosen

    def prepared(self, base: str, chosen: Sequence[Technique]) -> tuple[nn.Module, list[str]]:
        model = self.model(base, chosen)
        return model, techniques.apply_techniques(chosen, model, FAMILIES[base].task, 0)


@pytest.fixture(scope="module")
def bench(folders: dict[str, Path]) -> Bench:
    return Bench(folders)


def gradients(base: str, model: nn.Module, names: list[str], chosen: Sequence[Technique]) -> dict[str, Tensor]:
    """Gradients of one step in round 1, away from the start, with dropout on."""
    shake(model, names)
    begin_round(chosen, model, 1)
    set_train_mode(model)
    batch = FAMILIES[base].make_batch(rows=3, length=11)
    batch["attention_mask"][0, 7:] = 0
    begin_step(chosen, model, batch, 0.5)
    torch.manual_seed(3)
    compute_step_loss(FAMILIES[base].task, model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def a_round(
    base: str, model: nn.Module, names: list[str], chosen: Sequence[Technique], optimiser: str = "adamw"
) -> LocalTrainingResult:
    recipe = a_training_recipe(local_steps=2, batch_size=3, optimiser=optimiser)
    data = few_texts(language=base == "opt")
    return train_local_model(
        ClientRound(model, chosen, recipe, data, np.arange(8), 1, 1), get_model_state(model, names)
    )


def moved(outcome: LocalTrainingResult) -> bool:
    """Whether training changed something, to finite numbers."""
    finite = all(bool(delta.isfinite().all()) for delta in outcome.delta.values())
    return finite and any(bool(delta.any()) for delta in outcome.delta.values()) and np.isfinite(outcome.train_loss)


ALLOWED = [(base, joined) for base in BASES for joined in PAIRS if reason(base, joined) is None]
REFUSED = [(base, joined) for base in BASES for joined in PAIRS if reason(base, joined) is not None]
IN_TURN = {joined: BASES[number % len(BASES)] for number, joined in enumerate(PAIRS)}
"""One base for each pair, where a test's outcome does not depend on it."""
ONCE_REFUSED = [(base, joined) for base, joined in REFUSED if joined not in CLASHES or IN_TURN[joined] == base]
ONCE_TRAINED = [
    (base, joined) for base, joined in ALLOWED if IN_TURN[joined] == base or (IN_TURN[joined], joined) not in ALLOWED
]


def test_every_technique_is_driven_and_no_entry_is_stale() -> None:
    assert set(SETTINGS) <= set(NAMES)
    assert set(CLASHES) <= set(PAIRS)
    assert {name for _, name in MISFITS} <= set(NAMES)
    assert len(ALLOWED) + len(REFUSED) == len(BASES) * len(NAMES) * (len(NAMES) - 1) / 2


@pytest.mark.parametrize(("base", "joined"), ONCE_REFUSED)
def test_a_pair_that_makes_no_sense_is_refused_with_the_reason(bench: Bench, base: str, joined: str) -> None:
    for chain in (joined, "+".join(reversed(joined.split("+")))):
        with pytest.raises((ModelError, RecipeError), match=reason(base, joined)):
            bench.chosen(base, chain)


@pytest.mark.parametrize(("base", "joined"), [(b, j) for b, j in ALLOWED if not {*ZEROTH_ORDER} & {*j.split("+")}])
def test_a_pair_has_the_gradients_of_the_same_network_with_everything_stored(
    bench: Bench, base: str, joined: str
) -> None:
    model, names, chosen = bench.chosen(base, joined)
    stored = [made for made in (technique.make_reference() for technique in chosen) if made is not None]
    twin, twin_names = bench.prepared(base, stored)
    assert names == twin_names
    found, wanted = gradients(base, model, names, chosen), gradients(base, twin, names, stored)
    assert found.keys() == wanted.keys()
    if "fused-cross-entropy" in joined:  # sums over the vocabulary in another order
        scale = max(gradient.abs().max() for gradient in wanted.values())
        assert all((found[name] - wanted[name]).abs().max() < 1e-5 * scale for name in wanted)
    else:
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(gradient.any() for gradient in wanted.values())


@pytest.mark.parametrize(("base", "joined"), ONCE_TRAINED)
def test_a_pair_trains_a_round_in_either_order_as_its_pickled_copy_does(bench: Bench, base: str, joined: str) -> None:
    """A pool's workers get the model pickled, its storages shared."""
    model, names, chosen = bench.chosen(base, "+".join(reversed(joined.split("+"))))
    model.share_memory()
    other = pickle.loads(pickle.dumps(model))
    other_names = [name for name, _ in other.named_parameters()]
    assert other_names == [name for name, _ in model.named_parameters()]
    outcome, copied = a_round(base, model, names, chosen), a_round(base, other, names, chosen)
    assert moved(outcome)
    assert outcome.train_loss == copied.train_loss
    assert outcome.delta.keys() == copied.delta.keys()
    assert all(torch.equal(outcome.delta[name], copied.delta[name]) for name in outcome.delta)


@pytest.mark.parametrize(
    "joined", ["fused-cross-entropy+lora", "fused-cross-entropy+qlora", "lora+selective-checkpointing", "lora+meft"]
)
def test_eight_bit_optimisers_train_pairs_too(bench: Bench, joined: str) -> None:
    model, names, chosen = bench.chosen("opt", joined)
    assert moved(a_round("opt", model, names, chosen, "adamw_8bit"))


@pytest.mark.parametrize(
    "joined", ["activation-pruning+deft", "deft+activation-pruning", "division+deft", "deft+division"]
)
def test_activation_functions_of_one_bit_keep_the_hooks_of_others(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, joined: str
) -> None:
    monkeypatch.setitem(SETTINGS, "activation-pruning", {"pruned_fraction": 0.0, "value_precision": "half"})
    model, names, chosen = bench.chosen("opt", joined)
    stored = [made for made in (technique.make_reference() for technique in chosen) if made is not None]
    twin, _ = bench.prepared("opt", stored)
    found, wanted = gradients("opt", model, names, chosen), gradients("opt", twin, names, stored)
    scale = max(gradient.abs().max() for gradient in wanted.values())
    assert all((found[name] - wanted[name]).abs().max() < 2e-3 * scale for name in wanted)


def test_meft_fused_head_deft_and_a_four_bit_base_train_together(bench: Bench) -> None:
    model, names, chosen = bench.chosen("opt", "qlora+meft+deft+fused-cross-entropy")
    assert moved(a_round("opt", model, names, chosen, "adamw_8bit"))
