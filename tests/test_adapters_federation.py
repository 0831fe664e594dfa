"""Federations that train both factors of low-rank pairs, with the real server, models and exports."""

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from fedtune import checkpoint, techniques
from fedtune import paths as homes
from fedtune.device.client_app import app
from fedtune.errors import RecipeError
from fedtune.export import export_model
from fedtune.merging import MergeContext, build_pipeline, merge_client_updates
from fedtune.recipe.schema import Recipe, Unit
from fedtune.server.events import Event, RoundEnded, event_handler
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import ProcessPoolWorkers, SequentialWorkers
from fedtune.tracking import Store
from fedtune.training import clear_run_context, get_model_state, get_run_context, set_model_state
from fedtune.wire.client_update import pack
from tests.federations import Ended, begin, execute, outcome, silent, words
from tests.technique_steps import IMAGES, LANGUAGE, TEXT, chosen, logits, shake
from tests.test_adapters_rounds import ALL, EXACT, State
from tests.test_low_rank import Pointwise
from tests.test_merging import spool
from tests.tiny import bert


def test_pairs_are_told_with_their_scale_and_the_shared_base() -> None:
    model, picked = bert(), chosen("lora", trained_factors="both-and-base", rank=4, alpha=6)
    shared = techniques.apply_techniques(picked, model, TEXT, 0)
    pairs = techniques.list_low_rank_pairs(picked, model)
    assert len(pairs) == 13
    assert {(pair.scale, pair.transposed) for pair in pairs} == {(1.5, False)}
    assert {name for pair in pairs for name in (pair.left, pair.right, pair.base)} < set(shared)
    techniques.begin_round(picked, model, 1)
    now = set(techniques.list_trainable_tensors(model))
    assert all({pair.left, pair.right} <= now and pair.base not in now for pair in pairs)
    assert [technique.has_unchanged_base() for technique in (*picked, *chosen("lora", trained_factors="both"))] == [
        False,
        True,
    ]


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    )


def applied(model: nn.Module, task: str) -> tuple[tuple[techniques.Technique, ...], list[str]]:
    picked = chosen("lora", trained_factors="both-and-base", rank=4)
    shared = techniques.apply_techniques(picked, model, task, 0)  # type: ignore[arg-type]
    techniques.begin_round(picked, model, 1)
    return picked, shared


@pytest.mark.filterwarnings("ignore:lora puts no pair beside")  # the convolution over depth
@pytest.mark.parametrize("step", EXACT)
@pytest.mark.parametrize(("build", "task"), [(gpt2, LANGUAGE), (bert, TEXT), (Pointwise, IMAGES)])
def test_a_real_models_folded_weights_are_the_mean_of_its_clients(
    tmp_path: Path, step: str, build: object, task: str
) -> None:
    assert callable(build)
    model = build()
    [lora], shared = applied(model, task)
    names = techniques.list_trainable_tensors(model)
    state = get_model_state(model, shared)
    clients, contributions = [], []
    for client in range(3):
        set_model_state(model, state)
        shake(model, names, seed=client)
        after = get_model_state(model, names)
        contributions.append(spool(tmp_path, client, 1, {name: after[name] - state[name] for name in names}))
        clients.append(folded(model, lora))
    set_model_state(
        model,
        merge_client_updates(
            build_pipeline([Unit(name=step)]),
            state,
            names,
            contributions,
            MergeContext(low_rank_pairs=lora.list_low_rank_pairs(model)),
        ),
    )
    for name, weight in folded(model, lora).items():
        mean = torch.stack([client[name].double() for client in clients]).mean(0)
        torch.testing.assert_close(weight.double(), mean, rtol=0, atol=2e-6)


def folded(model: nn.Module, lora: techniques.Technique) -> dict[str, Tensor]:
    plain = copy.deepcopy(model)
    lora.merge_into_weights(plain)
    return {name: tensor.clone() for name, tensor in plain.state_dict().items()}


MISFITS = [
    (
        "lora: {trained_factors: both}",
        "mean",
        r"^merge: mean takes tensors, but lora sends pairs; merge by fedit, flexlora or het",
    ),
    (
        "lora",
        "fedit",
        r"^merge: fedit takes pairs, but lora sends one factor; set lora: {trained_factors: both}, or merge by mean$",
    ),
    (
        "full",
        "flora",
        r"^merge: flora takes pairs and base, but clients send tensors; set lora: {trained_factors: both-and-base}, or",
    ),
    (
        "lora: {trained_factors: both}",
        "fedex-lora",
        r"^merge: fedex-lora takes pairs and base, but lora sends pairs; set lora: ",
    ),
    (
        "qlora: {trained_factors: both-and-base}",
        "flora",
        r"qlora: trained_factors: both-and-base changes the base weights, but four-bit weights",
    ),
]


@pytest.mark.parametrize(("technique", "step", "message"), MISFITS)
def test_a_merge_that_misfits_what_is_trained_is_refused(
    tmp_path: Path, technique: str, step: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        words(
            tmp_path,
            f"train.techniques=[{technique}]" if "{" not in technique else f"train.techniques=[{{{technique}}}]",
            f"merge=[{step}]",
        )


def recipe(folder: Path, step: str, *overrides: str) -> Recipe:
    exact = "remainder" if step in EXACT else "none"
    return words(folder, f"train.techniques=[{{lora: {{exact: {exact}, rank: 2}}}}]", f"merge=[{step}]", *overrides)


def states(ended: Ended) -> list[dict[str, Tensor]]:
    saved = [record.checkpoint for record in ended.rounds]
    return [
        checkpoint.read_checkpoint(homes.get_runs_folder() / one.path, one.sha256) for one in saved if one is not None
    ]


@pytest.mark.parametrize("step", ALL)
def test_a_federation_merges_by_pairs_and_keeps_the_error_of_each_round(home: Path, tmp_path: Path, step: str) -> None:
    ended = execute(recipe(tmp_path, step))
    assert {found.status for record in ended.rounds[1:] for found in record.client_records} == {"merged"}
    kept = [{m.name: m.value for m in record.metrics if m.split == "merge"} for record in ended.rounds]
    assert kept[0] == {}
    assert all(0 < figures["factor_error"] < 1 for figures in kept[1:])
    start, *_, last = states(ended)
    moved = {name for name in start if not torch.equal(start[name], last[name])}
    assert any(".base_layer." in name for name in moved) == (step in EXACT)
    assert "classifier.weight" in moved


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by peft itself
@pytest.mark.parametrize("step", ["flexlora", "fedex-lora"])
def test_an_export_says_what_the_federation_learned(home: Path, tmp_path: Path, step: str) -> None:
    made = recipe(tmp_path, step, "federation.rounds=1")
    state = states(execute(made))[-1]
    form = export_model(made, state, tmp_path / "out", None, "")
    assert form == ("model" if step in EXACT else "adapter")
    shop = get_run_context(made.model_dump_json())
    set_model_state(shop.model, state)
    batch = {name: tensor for name, tensor in shop.test.make_batch(range(8)).items() if name != "labels"}
    expected = logits(shop.model, batch)
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / ("out" if form == "model" else "bert"), num_labels=2
    )
    loaded = base if form == "model" else PeftModel.from_pretrained(base, str(tmp_path / "out"))
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-5)


class Halted(BaseException):
    """In place of a power cut."""


def halt_after(number: int) -> Callable[[Event], None]:
    def halt(event: Event) -> None:
        if isinstance(event, RoundEnded) and event.record.number == number:
            raise Halted

    return halt


@pytest.mark.parametrize("step", ["flexlora", "flora"])
def test_a_halted_run_goes_on_to_the_same_bits(home: Path, tmp_path: Path, step: str) -> None:
    made = recipe(tmp_path, step, "federation.rounds=3")
    alone = execute(made, run="alone")
    with Store.open() as store:
        begin(store, made, "halted")
        token = event_handler.set(halt_after(2))
        with pytest.raises(Halted):
            run_to_completion(InProcessGrid(made.num_clients, SequentialWorkers(app)), store, "halted")
        event_handler.reset(token)
        clear_run_context()
        with silent():
            run_to_completion(InProcessGrid(made.num_clients, SequentialWorkers(app)), store, "halted")
    assert outcome("halted").hashes == alone.hashes
    assert [record.metrics for record in outcome("halted").rounds] == [record.metrics for record in alone.rounds]


def digest(state: State, factor: str) -> str:
    return hashlib.sha256(pack({name: t for name, t in state.items() if f".lora_{factor}." in name})).hexdigest()


@pytest.mark.parametrize(("exact", "frozen"), [("alternate", "AB"), ("freeze-a", "AA")])
def test_the_factor_that_is_not_trained_keeps_its_bits(home: Path, tmp_path: Path, exact: str, frozen: str) -> None:
    made = words(tmp_path, f"train.techniques=[{{lora: {{exact: {exact}}}}}]")
    kept = states(execute(made))
    for number, factor in enumerate(frozen):
        other = "BA"["AB".index(factor)]
        assert digest(kept[number], factor) == digest(kept[number + 1], factor)
        assert digest(kept[number], other) != digest(kept[number + 1], other)


@pytest.mark.slow
def test_a_pool_of_processes_ends_in_the_same_bits(home: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path, "fedex-lora")
    in_turn = execute(made, run="in-turn")
    pool = execute(made, ProcessPoolWorkers(get_run_context(made.model_dump_json()), 1), run="pool")
    assert pool.hashes == in_turn.hashes
