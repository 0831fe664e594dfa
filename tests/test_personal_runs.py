"""Federations whose clients keep tensors or models of their own: what travels, what is found again, what is refused."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flwr.app import Error, Message
from safetensors.torch import load_file
from torch import Tensor

from fedtune import checkpoint, paths
from fedtune.cli.main import cli
from fedtune.device import local_state
from fedtune.device.own_memory import ALGORITHM_PREFIX, MemoryFolder
from fedtune.errors import ModelError, RecipeError
from fedtune.recipe.schema import Recipe
from fedtune.server.run_state import select_run_state
from fedtune.techniques import list_head_parameters, list_kept_tensors
from fedtune.training import clear_run_context, get_model_state, get_run_context
from fedtune.wire.client_update import decode_tensors
from tests.federations import Ended, execute, order_of, sent_state, spoilt, trivial, words
from tests.personal_twins import run_personal_twin
from tests.streams import CLASSES, resolve_stream
from tests.test_algorithm_runs import FEW, make_clients, read_last_state, with_algorithm

HOLDOUT = "evaluation.local_holdout=0.25"


def on_texts(folder: Path, name: str, *overrides: str, **settings: Any) -> Recipe:
    return words(folder, f"federation.algorithm={json.dumps({name: settings})}", HOLDOUT, "train.lr=0.05", *overrides)


def read_kept(run: str, client: int, before: int = 99) -> dict[str, Tensor]:
    return local_state.load_local_state(paths.get_runs_folder() / run / "own" / f"client-{client:06d}", before)


def read_own(run: str, client: int, number: int) -> dict[str, Tensor]:
    folder = paths.get_runs_folder() / run / "own" / f"client-{client:06d}"
    found = MemoryFolder(folder, run, prefix=ALGORITHM_PREFIX).read_earlier(number + 1)
    return next(iter(found.values()))


def read_scores(ended: Ended, moment: str) -> dict[tuple[int, int], float]:
    """Losses by round and client."""
    return {
        (record.number, one.client): one.value
        for record in ended.rounds
        for one in record.client_scores
        if (one.moment, one.name) == (moment, "loss")
    }


def test_kept_tensors_never_travel_and_are_found_again_after_rounds_away(home: Path, tmp_path: Path) -> None:
    recipe = on_texts(
        tmp_path, "fedper", "federation.rounds=5", "federation.clients_per_round=2", "merge=[mean, fedadam]"
    )
    context = get_run_context(recipe.model_dump_json())
    kept = list_kept_tensors(context.model)
    start = get_model_state(context.model, kept)
    assert set(kept) == set(list_head_parameters(context.model))
    travelled: set[str] = set()
    heads: dict[tuple[int, int], dict[str, Tensor]] = {}

    def note(message: Message, reply: Message) -> Message:
        number, client = order_of(message)
        travelled.update(decode_tensors(bytes(sent_state(message))))
        travelled.update(decode_tensors(bytes(reply.content.array_records["delta"]["safetensors"].data)))
        heads[number, client] = read_kept("run-1", client)
        return reply

    clear_run_context()
    ended = execute(recipe, spoilt(note, range(3)))
    assert not travelled & set(kept)
    assert travelled
    last = paths.get_runs_folder() / "run-1" / "round-0005.safetensors"
    moments = select_run_state(checkpoint.read_checkpoint(checkpoint.get_memory_path(last)), "merge")
    assert moments
    assert not any(name.endswith(tuple(kept)) for name in moments), "a server optimiser has no moments of kept tensors"
    before, after = (read_scores(ended, moment) for moment in ("before", "after"))
    gaps = 0
    for client in range(3):
        rounds = [number for number, one in sorted(heads) if one == client]
        assert not torch.equal(heads[rounds[0], client][kept[0]], start[kept[0]])
        gaps += sum(later - earlier > 1 for earlier, later in pairwise(rounds))
    assert gaps, "some client was away"
    assert before.keys() == after.keys() == heads.keys()


def test_an_own_model_goes_on_where_it_was_although_its_device_was_away(home: Path, tmp_path: Path) -> None:
    """Before its next round, the model of a client has the loss that it had after its last one."""
    recipe = on_texts(tmp_path, "ditto", "federation.rounds=6", "federation.clients_per_round=2", lam=0.5)
    ended = execute(recipe)
    before, after = (read_scores(ended, moment) for moment in ("before", "after"))
    away = 0
    for client in range(3):
        rounds = sorted(number for number, one in before if one == client)
        for earlier, later in pairwise(rounds):
            assert before[later, client] == pytest.approx(after[earlier, client], rel=1e-5)
            assert after[later, client] != before[later, client]
            away += later - earlier > 1
    assert away


@pytest.mark.parametrize("name", ["ditto", "apfl", "private-adapter"])
def test_the_shared_model_has_the_bits_of_one_without_own_models(home: Path, tmp_path: Path, name: str) -> None:
    """Also with dropout, whose random numbers are drawn in another order."""
    lora = "train.techniques=[{lora: {dropout: 0.2}}, gradient-checkpointing]"
    with_own = execute(on_texts(tmp_path, name, lora), run="own")
    plain = execute(words(tmp_path, HOLDOUT, "train.lr=0.05", lora), run="plain")
    assert with_own.hashes == plain.hashes
    assert [one.bytes_up for one in with_own.rounds[1].client_records] == [
        one.bytes_up for one in plain.rounds[1].client_records
    ]
    own, shared = (read_scores(ended, "after") for ended in (with_own, plain))
    assert own.keys() == shared.keys()
    assert all(own[key] != shared[key] for key in own)


@pytest.mark.parametrize("name", ["ditto", "apfl"])
def test_own_models_of_a_whole_run_in_single_precision_follow_the_twin(home: Path, name: str) -> None:
    rounds, settings = 3, {"ditto": {"lam": 0.5}, "apfl": {"alpha": 0.4, "adaptive": True}}[name]
    recipe = with_algorithm(
        name,
        *("train.batch_size=500", "train.local_steps=3", "train.lr_schedule=constant", *FEW),
        *("data.partition={kind: dirichlet, alpha: 0.3}", f"federation.rounds={rounds}"),
        **settings,
    )
    clients = make_clients(recipe, rounds)
    expected = run_personal_twin(name, clients, settings)
    execute(recipe)
    np.testing.assert_allclose(read_last_state_of(recipe, rounds), expected.state, rtol=0, atol=1e-5)
    order = [name for name, _ in get_run_context(recipe.model_dump_json()).model.named_parameters()]
    for client in range(4):
        own = read_own("run-1", client, rounds)
        found = [own[f"own/{name}"].double().numpy().ravel() for name in order]
        found += [own["alpha"].double().numpy()] if name == "apfl" else []
        np.testing.assert_allclose(np.concatenate(found), expected.own[client], rtol=0, atol=1e-5)


def read_last_state_of(recipe: Recipe, number: int) -> np.ndarray:
    return read_last_state(Ended(run=_Run(recipe), rounds=[]), number)  # type: ignore[arg-type]


class _Run:
    id = "run-1"

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe.model_dump_json()


def test_an_own_model_whose_round_was_lost_goes_on_from_its_last_merged_round(home: Path) -> None:
    def lose(message: Message, _: Message) -> Message:
        return Message(Error(0, "lost"), reply_to=message)

    recipe = with_algorithm("ditto", *FEW, HOLDOUT, "federation.rounds=3", lam=0.3)
    ended = execute(recipe, spoilt(lose, [1], rounds=[2]))
    before, after = (read_scores(ended, moment) for moment in ("before", "after"))
    assert (2, 1) not in before
    assert before[3, 1] == pytest.approx(after[1, 1], rel=1e-5)
    assert before[3, 0] == pytest.approx(after[2, 0], rel=1e-5)


def test_what_rounds_before_a_rollback_left_does_not_outlive_the_next_round(tmp_path: Path) -> None:
    for number in (8, 9, 4, 5):
        local_state.save_local_state(tmp_path, number, {"n": torch.tensor(float(number))})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0004.safetensors", "round-0005.safetensors"]
    assert local_state.load_local_state(tmp_path, 10)["n"] == 5


LORA_BOTH = 'train.techniques=[{lora: {trained_factors: "both"}}]'
DEVICES = "devices=[{name: a, count: 2}, {name: b, count: 2, techniques: [head-only]}]"
PERSONAL = ("fedper", "fedrep", "ditto", "apfl", "private-adapter")


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("fedper", (), "evaluation.local_holdout: fedper leaves the server no whole model to score"),
        ("fedper", (HOLDOUT, "evaluation.prompts=[hello]"), "no whole model to generate text with"),
        ("fedper", (HOLDOUT, "merge=[rebasin, mean]"), "rebasin permutes them; drop rebasin"),
        ("ditto", ("merge=[rebasin, mean]",), "rebasin permutes them; drop rebasin"),
        ("fedrep", (HOLDOUT, "train.optimiser=lomo", "train.max_grad_norm=null"), "which lomo applies before"),
        ("apfl", ("train.optimiser=lomo", "train.max_grad_norm=null"), "which lomo applies before"),
        ("fedper", ("privacy={clipping_norm: 1, noise_multiplier: 1}",), "with privacy they send no scores"),
        ("fedper", (HOLDOUT, DEVICES), "b has techniques of its own; let all devices train alike"),
        ("ditto", (DEVICES,), "b has techniques of its own; let all devices train alike"),
        ("ditto", ("devices=[{count: 1}]",), "the recipe has one, which would train by itself"),
        ("ditto", ("train.techniques=compact",), "past compact, which trains another random subspace"),
        ("fedper", (HOLDOUT, "train.techniques=dynamic-pruning"), "dynamic-pruning sends masks that change them"),
        ("ditto", (LORA_BOTH, "merge=[flexlora]"), "flexlora makes other factors each round"),
        ("private-adapter", (), "train.techniques adds none; add lora or qlora"),
        ("fedper: {keep: []}", (), "keep"),
        ("fedper: {keep: ''}", (), "keep"),
        ("fedrep: {head_share: 1}", (), "head_share"),
        ("ditto: {lam: -1}", (), "lam"),
        ("ditto: {lam: .nan}", (), "lam"),
        ("apfl: {alpha: 0}", (), "alpha"),
        ("apfl: {alpha: 1.5}", (), "alpha"),
        ("fedpar", (), "there is no 'fedpar'; did you mean 'fedper'"),
    ],
)
def test_what_clients_cannot_keep_is_refused(name: str, overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        trivial(f"federation.algorithm={{{name}}}" if ":" in name else f"federation.algorithm={name}", *overrides)


@pytest.mark.parametrize("name", PERSONAL)
def test_merges_that_rewrite_the_base_are_refused(tmp_path: Path, name: str) -> None:
    base = 'train.techniques=[{lora: {trained_factors: "both-and-base"}}]'
    for merge in ("flora", "fedex-lora"):
        with pytest.raises(RecipeError, match=f"{merge} rewrites the base"):
            on_texts(tmp_path, name, base, f"merge=[{merge}]")


@pytest.mark.parametrize(
    ("keep", "overrides", "reason"),
    [
        ("adapters", ("train.techniques=head-only",), "keeps 'adapters', but the techniques train no such tensor"),
        ("nothing.*", (), "keeps 'nothing.*', but the techniques train no such tensor"),
        (["head", "hede"], (), "keeps 'hede'"),
        ("*", (), "keeps all that is trained"),
        ("head", ("train.techniques=head-only",), "keeps all that is trained"),
        (["head", "*.lora_B.*"], (), "keeps all that a round such as round 1 trains"),
        ("adapters", (LORA_BOTH, "merge=[fedit]"), "fedit wants whole pairs"),
    ],
)
def test_what_matches_nothing_everything_or_half_a_pair_is_refused(
    home: Path, tmp_path: Path, keep: Any, overrides: tuple[str, ...], reason: str
) -> None:
    with pytest.raises((ModelError, RecipeError), match=reason.replace("*", r"\*")):
        get_run_context(on_texts(tmp_path, "fedper", *overrides, keep=keep).model_dump_json())


def test_a_model_that_is_all_head_has_nothing_to_share(home: Path) -> None:
    with pytest.raises(ModelError, match="keeps all that is trained"):
        get_run_context(trivial("federation.algorithm=fedper", HOLDOUT).model_dump_json())


def test_adapters_and_patterns_can_be_kept(home: Path, tmp_path: Path) -> None:
    for place, keep in enumerate(["adapters", "*.lora_B.*"]):
        execute(on_texts(tmp_path, "fedper", keep=keep), run=f"run-{place}")
    adapters, factors = (set(read_kept(f"run-{place}", 0)) for place in (0, 1))
    assert factors < adapters
    assert {name for name in adapters if ".lora_B." in name} == factors
    state = checkpoint.read_checkpoint(paths.get_runs_folder() / "run-0" / "round-0002.safetensors")
    assert not any("lora" in name for name in state)


def test_an_export_says_that_the_head_is_the_one_from_before_training(home: Path, tmp_path: Path) -> None:
    recipe = on_texts(tmp_path, "fedrep", "federation.rounds=1")
    execute(recipe)
    exported = CliRunner().invoke(cli, ["export", "latest", "-o", str(tmp_path / "out"), "--format", "model"])
    assert exported.exit_code == 0, exported.output
    assert "The head has the values from before training" in exported.output
    assert "The head has the values from before training" in (tmp_path / "out" / "README.md").read_text()
    clear_run_context()
    context = get_run_context(recipe.model_dump_json())
    start = get_model_state(context.model, list_kept_tensors(context.model))
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(whole[name], one) for name, one in start.items())
    assert not any(torch.equal(one, start[name]) for name, one in read_kept("run-1", 0).items())
    refused = CliRunner().invoke(cli, ["evaluate", "latest"])
    assert "keeps some tensors of its model on the devices" in str(refused.exception)
    shown = CliRunner().invoke(cli, ["runs", "show", "latest"])
    assert "after training" in shown.output
    assert "worst tenth" in shown.output
    drawn = CliRunner().invoke(cli, ["runs", "plot", "latest", "-o", str(tmp_path / "run.svg")])
    assert drawn.exit_code == 0, drawn.output


@pytest.mark.parametrize("name", ["fedper", "fedrep", "ditto", "apfl", "private-adapter"])
def test_streams_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} keeps what belongs to one task, and a stream goes on to others"):
        resolve_stream(CLASSES, federation={"algorithm": name})
