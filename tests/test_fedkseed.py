"""``fedkseed``: weights are a sum over seeds with the same bits everywhere, and K scalars are all that is sent."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from fedtune import checkpoint, paths, techniques
from fedtune.device.memory_budget import MemoryEstimate, estimate_memory
from fedtune.errors import ModelError, RecipeError
from fedtune.export import export_model
from fedtune.plan.candidates import Candidate
from fedtune.plan.trace_settings import trace_candidate
from fedtune.recipe.schema import Unit
from fedtune.techniques.zeroth_order._seed_sum import find_seed_sum
from fedtune.training import ClientRound, get_model_state, get_run_context, set_model_state, train_local_model
from fedtune.wire.client_update import pack
from tests.breaks import kill_and_resume
from tests.families import FAMILIES
from tests.federations import Ended, execute, trivial, words
from tests.profile_examples import a_recipe, tiny_bert
from tests.streams import CLASSES, resolve_stream
from tests.test_plan_trace import compare, with_techniques
from tests.tiny import a_training_recipe, few_texts

SCALARS = "fedkseed.coefficients"
SGD = ("train.optimiser=sgd", "train.max_grad_norm=null")
UNITS = {
    "full": [Unit(name="full"), Unit(name="fedkseed", settings={"seeds": 50})],
    "lora": [
        Unit(name="fedkseed", settings={"seeds": 50}),
        Unit(name="lora", settings={"rank": 2, "trained_factors": "b-only"}),
    ],
}
"""In both orders."""


def prepared(family: str, name: str) -> tuple[Any, Any, list[str]]:
    model: nn.Module = FAMILIES[family].model()
    units = techniques.build_techniques(UNITS[name])
    return model, units, techniques.apply_techniques(units, model, FAMILIES[family].task, 0)


def draw_sum(model: nn.Module, scalars: Tensor) -> dict[str, Tensor]:
    """The weights of a slow twin in double precision: whole tensors, in the order of their names."""
    found = find_seed_sum(model)
    assert found is not None
    base = {name: found.get_buffer(f"base_{number}").double() for number, name in enumerate(sorted(found.names))}
    for seed, scalar in zip(found.seeds, scalars.tolist(), strict=True):
        generator = torch.Generator().manual_seed(seed)
        for name, value in base.items():
            base[name] = value + scalar * torch.randn(value.shape, generator=generator).double()
    return base


def draw_scalars(share: float, seed: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 0.01 * torch.randn(50, generator=random) * (torch.rand(50, generator=random) < share)


@pytest.mark.parametrize("name", UNITS)
def test_weights_are_the_sum_over_seeds_whatever_they_were_before(name: str) -> None:
    """A device that was there all the time, and one that was away, have the same bits."""
    model, _, shared = prepared("bert", name)
    late, _, _ = prepared("bert", name)
    assert shared == [SCALARS]
    scalars = draw_scalars(0.7)
    for share in (0.1, 0.4):
        set_model_state(model, {SCALARS: draw_scalars(share)})
    for one in (model, late):
        set_model_state(one, {SCALARS: scalars})
    wanted = draw_sum(model, scalars)
    assert len(wanted) > 8
    for key, value in wanted.items():
        found = model.get_parameter(key)
        assert torch.equal(found, late.get_parameter(key))
        assert torch.allclose(found.double(), value, rtol=0, atol=1e-6)
        assert not found.requires_grad


@pytest.mark.parametrize("name", UNITS)
def test_a_client_sends_the_scalars_of_its_steps(name: str) -> None:
    model, units, _ = prepared("bert", name)
    recipe = a_training_recipe(local_steps=4, batch_size=4, optimiser="sgd", lr=1e-3)
    client = ClientRound(model, units, recipe, few_texts(), np.arange(8), 2, 1)
    start = {SCALARS: draw_scalars(0.5)}
    outcome = train_local_model(client, start)
    delta = outcome.delta[SCALARS]
    assert list(outcome.delta) == [SCALARS]
    assert 1 <= int((delta != 0).sum()) <= 4
    assert outcome.activation_bytes <= 16
    trained = {key: model.get_parameter(key).detach().double() for key in find_seed_sum(model).names}  # type: ignore[union-attr]
    wanted = draw_sum(model, start[SCALARS] + delta)
    before = draw_sum(model, start[SCALARS])
    assert all(torch.allclose(trained[key], value, rtol=0, atol=1e-6) for key, value in wanted.items())
    assert any(bool((value - before[key]).abs().max() > 1e-5) for key, value in wanted.items())
    again = train_local_model(client, start)
    assert torch.equal(again.delta[SCALARS], delta)


def test_each_scalar_is_the_slope_along_its_direction() -> None:
    model, units, _ = prepared("opt", "full")
    scalars, steps = torch.zeros(50), units[1].make_step_estimator(model, {}, 9)
    batch = FAMILIES["opt"].make_batch()
    steps.estimate_slope(lambda: model.eval()(**batch).loss)
    steps.step(0.5)
    [place] = model.fedkseed.coefficients.nonzero().flatten().tolist()
    losses = []
    for sign in (1, -1):
        scalars[place] = sign * 1e-3
        twin, _, _ = prepared("opt", "full")
        for key, value in draw_sum(twin, scalars).items():
            twin.get_parameter(key).data = value
        losses.append(float(twin.double().eval()(**batch).loss.detach()))
    slope = (losses[0] - losses[1]) / 2e-3
    assert float(model.fedkseed.coefficients[place]) == pytest.approx(-0.5 * slope, rel=0.02)
    assert abs(slope) > 0.01


def hashes_of(ended: Ended) -> list[str]:
    assert ended.run.status == "completed", ended.run
    return ended.hashes


@pytest.mark.parametrize("merge", ["[mean]", "[mean, {fedavgm: {lr: 0.5}}]", "[krum]", "[geometric-median]"])
def test_a_killed_run_ends_with_the_bits_of_one_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, merge: str
) -> None:
    few = ("data.max_train_examples=80", "federation.rounds=3", "train.lr=0.01", "devices=[{name: toy, count: 6}]")
    recipe = trivial(f"train.techniques={KSEED}", *SGD, *few, f"merge={merge}")
    alone = execute(recipe, run="alone")
    killed = kill_and_resume(recipe, monkeypatch)
    assert hashes_of(killed) == hashes_of(alone)
    assert len(set(alone.hashes)) == 4


KSEED = json.dumps([{"full": {}}, {"fedkseed": {"seeds": 60}}])
ADAPTERS = json.dumps([{"lora": {"rank": 2, "trained_factors": "b-only"}}, {"fedkseed": {}}])


def test_the_wire_carries_less_than_18_kilobytes_in_each_direction(home: Path, tmp_path: Path) -> None:
    """With the default of 4,096 seeds; the merged scalars are the mean of the clients'."""
    ended = execute(words(tmp_path, f"train.techniques={ADAPTERS}", *SGD, "train.lr=0.01"))
    assert ended.run.status == "completed"
    for record in ended.rounds[1:]:
        for client in record.client_records:
            assert 16384 < client.bytes_up < 18000
            assert 16384 < client.bytes_down < 18000
    assert set(read_state(ended)) == {SCALARS}
    assert len(pack(read_state(ended))) < 18000


def read_state(ended: Ended) -> dict[str, Tensor]:
    saved = ended.rounds[-1].checkpoint
    assert saved is not None
    return checkpoint.read_checkpoint(paths.get_runs_folder() / saved.path, saved.sha256)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft itself
@pytest.mark.parametrize("form", ["adapter", "model"])
def test_an_export_has_the_rebuilt_weights(home: Path, tmp_path: Path, form: Any) -> None:
    from peft import PeftModel
    from transformers import AutoConfig

    recipe = words(tmp_path, f"train.techniques={ADAPTERS}", *SGD, "train.lr=0.01", "federation.rounds=1")
    state = {SCALARS: 1e-2 * torch.randn(4096, generator=torch.Generator().manual_seed(0))}
    context = get_run_context(recipe.model_dump_json())
    set_model_state(context.model, {SCALARS: torch.zeros(4096)})
    inputs = context.test.make_batch(range(6))
    inputs.pop("labels")
    with torch.no_grad():
        untrained = context.model.eval()(**inputs).logits
        set_model_state(context.model, state)
        wanted = context.model.eval()(**inputs).logits
        assert export_model(recipe, state, tmp_path / "out", form, "") == form
        if form == "adapter":
            config = AutoConfig.from_pretrained(tmp_path / "out")
            base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", config=config)
            found: Any = PeftModel.from_pretrained(base, tmp_path / "out")
        else:
            found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        logits = found.eval()(**inputs).logits
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    assert (wanted - untrained).abs().max() > 1e-2


def test_a_plan_counts_the_second_copy_of_what_is_trained(tmp_path: Path) -> None:
    recipe = a_recipe(tiny_bert(tmp_path), *SGD)
    compare(with_techniques(recipe, "fedkseed+full", seeds=9), ("a", "b", "c"))
    plain, summed = (
        trace_candidate(recipe, ("a", "b", "c"), Candidate(units, "float32"))
        for units in ((Unit(name="full"),), (Unit(name="full"), Unit(name="fedkseed")))
    )
    assert plain.error is None
    assert summed.error is None
    assert summed.weight_bytes == plain.weight_bytes + 4 * plain.trained_values + 4 * 4096
    assert summed.trained_values == 4096
    assert summed.up_bytes < 18000
    assert not summed.needs_gradients


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["merge=[ties]"], "merge: ties works on the entries of weights, but with fedkseed clients send scalars"),
        (["merge=[mean, aim]"], "merge: aim works on the entries"),
        (["merge=[rebasin, mean]"], "merge: rebasin works on the entries"),
        (["merge=[regmean]"], "merge: regmean works on the entries"),
        (["merge=[median]"], "and leave most of them at zero; merge by mean, geometric-median, krum"),
        (["merge=[trimmed-mean]"], "merge: trimmed-mean works on the entries"),
        (["federation.algorithm=fednova"], "fednova works on the weights of clients, and with fedkseed"),
        (["train.optimiser=adamw"], "fedkseed takes the steps of plain SGD"),
        (["train.techniques=[full, fedkseed, mezo]"], "both take the steps of a round"),
        (["train.techniques=[lora, fedkseed]"], "lora trains others each round; set trained_factors: b-only"),
        (["train.techniques=[{lora: {trained_factors: both-and-base}}, fedkseed]"], "and lora sends a base too"),
        (["train.techniques=[full, fedkseed, offload]"], "fedkseed runs no backward pass, which offload changes"),
        (["devices=[{name: a, count: 1}, {name: b, count: 1, techniques: [full]}]"], "b has techniques of its own"),
    ],
)
def test_what_works_on_weights_is_refused(overrides: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        trivial("train.techniques=[full, fedkseed]", *SGD, *overrides)


def test_a_stream_is_refused() -> None:
    train = {"techniques": ["full", "fedkseed"], "optimiser": "sgd", "lr": 0.01, "local_steps": 1}
    with pytest.raises(RecipeError, match="stream: fedkseed adds the scalars of all rounds"):
        resolve_stream(CLASSES, train=train)


def test_weights_of_lower_precision_are_refused() -> None:
    model: nn.Module = FAMILIES["opt"].model()
    model = model.to(torch.bfloat16)
    with pytest.raises(ModelError, match=r"which bfloat16 would lose in rounding; set model\.dtype: float32"):
        techniques.apply_techniques(techniques.build_techniques(UNITS["full"]), model, FAMILIES["opt"].task, 0)


def test_what_is_trained_merges_into_plain_layers() -> None:
    model, units, _ = prepared("bert", "lora")
    set_model_state(model, {SCALARS: draw_scalars(0.5)})
    state = get_model_state(model, [SCALARS])
    batch = FAMILIES["bert"].make_batch()
    with torch.no_grad():
        before = model.eval()(**batch).logits
        techniques.merge_into_weights(units, model)
        assert torch.allclose(model.eval()(**batch).logits, before, atol=1e-5)
    assert SCALARS not in model.state_dict()
    assert state[SCALARS].any()


@pytest.mark.parametrize("units", [ADAPTERS, '[{"lora": {"rank": 2}}, "mezo"]'])
def test_a_device_estimates_the_memory_of_steps_without_a_backward_pass(tmp_path: Path, units: str) -> None:
    def run(chosen: str, *more: str) -> tuple[MemoryEstimate, dict[str, Tensor], dict[str, Tensor]]:
        recipe = words(tmp_path, f"train.techniques={chosen}", *more)
        context = get_run_context(recipe.model_dump_json())
        before = {name: one.clone() for name, one in context.model.state_dict().items()}
        return estimate_memory(context, np.arange(8), 1), before, context.model.state_dict()

    found, before, after = run(units, *SGD)
    trained, _, _ = run('["lora"]')
    assert 0 < found.bytes_per_example < trained.bytes_per_example / 2
    assert all(torch.equal(one, after[name]) for name, one in before.items())
