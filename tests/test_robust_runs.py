"""Robust merges and attacks in whole runs: killed and resumed, refused where they cannot hold, recorded."""

from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from flwr.app import Message
from torch import Tensor

from fedtune import checkpoint, paths
from fedtune.attacks import AttackedTensor
from fedtune.attacks.a_little_is_enough import ALittleIsEnough, compute_largest_z
from fedtune.attacks.label_flip import LabelFlip
from fedtune.attacks.model_replacement import ModelReplacement
from fedtune.attacks.noise import Noise
from fedtune.attacks.sign_flip import SignFlip
from fedtune.cli.runs import runs
from fedtune.device.local_data import LocalData
from fedtune.device.problems import problem_of
from fedtune.errors import RecipeError, RunError
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import Store
from fedtune.training.resolve import resolve_recipe
from fedtune.wire.client_update import TrainRequest
from tests.federations import Ended, begin, execute, order_of, outcome, silent, spoilt, trivial, words
from tests.recipe_examples import TEXT
from tests.test_buffered import deployed
from tests.test_server_operating import Audit, asking, operating

PAIRS = [
    ("label-flip", "{krum: {f: 2}}"),
    ("sign-flip", "{multi-krum: {f: 2}}"),
    ("noise", "{bulyan: {f: 1}}"),
    ("a-little-is-enough", "median"),
    ("model-replacement", "centred-clipping"),
    ("sign-flip", "{fltrust: {root_data: validation, root_examples: 20}}"),
]


def attacked(attack: str, merge: str = "mean", *overrides: str, good: int = 5, bad: int = 2) -> Recipe:
    devices = f"[{{name: good, count: {good}}}, {{name: bad, count: {bad}, attack: {attack}}}]"
    return trivial(f"devices={devices}", f"merge=[{merge}]", *overrides)


def resumed(recipe: Recipe, at: tuple[int, int]) -> Ended:
    """A run that is stopped when a client has trained in a round, and resumed."""
    stops = [at]

    def stop(message: Message, reply: Message) -> Message:
        if order_of(message) in stops:
            stops.clear()
            raise KeyboardInterrupt
        return reply

    client = spoilt(stop, {at[1]}, rounds={at[0]})
    with Store.open() as store, silent():
        run = begin(store, recipe, "stopped")
        with pytest.raises(KeyboardInterrupt):
            run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(client)), store, run)
        store.reopen(run)
        run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(client)), store, run)
    return outcome("stopped")


def rows(ended: Ended) -> list[tuple[Any, ...]]:
    return [(one.number, m.split, m.name, m.value) for one in ended.rounds for m in one.metrics]


@pytest.mark.parametrize(("attack", "merge"), PAIRS)
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_left_alone(home: Path, attack: str, merge: str) -> None:
    recipe = attacked(attack, merge)
    alone, again = execute(recipe, run="alone"), resumed(recipe, (2, 6))
    assert alone.hashes == again.hashes
    assert rows(alone) == rows(again)
    assert len(set(alone.hashes)) == 3
    assert [one.reason for record in alone.rounds[1:] for one in record.client_records[5:]] == [f"attack: {attack}"] * 4


def last_merge(ended: Ended, number: int) -> dict[str, Tensor]:
    kept = ended.rounds[number].checkpoint
    assert kept is not None
    assert kept.memory_sha256 is not None
    path = checkpoint.get_memory_path(paths.get_runs_folder() / kept.path)
    return checkpoint.read_checkpoint(path, kept.memory_sha256)


def state(ended: Ended, number: int) -> dict[str, Tensor]:
    kept = ended.rounds[number].checkpoint
    assert kept is not None
    return checkpoint.read_checkpoint(paths.get_runs_folder() / kept.path, kept.sha256)


def test_centred_clipping_remembers_what_the_last_merge_gave_also_through_failed_rounds(home: Path) -> None:
    """Clients that fail in rounds 2 to 4 leave the memory of round 1, whose own file is pruned by then."""

    def fail(message: Message, reply: Message) -> Message:
        raise ValueError

    recipe = trivial("merge=[centred-clipping]", "federation.rounds=5", "checkpoints={keep: {last: 1, every: null}}")
    ended = execute(recipe, spoilt(fail, range(4), rounds={2, 3, 4}), run="failing")
    assert [record.status for record in ended.rounds] == ["completed", "completed", *["failed"] * 3, "completed"]
    found, before = last_merge(ended, 5), state(ended, 5)
    whole = execute(trivial("merge=[centred-clipping]", "checkpoints={keep: all}"), run="whole")
    for name, tensor in last_merge(whole, 2).items():
        key = name.removeprefix("run:reference/")
        torch.testing.assert_close(tensor, state(whole, 2)[key] - state(whole, 1)[key], rtol=0, atol=0)
        assert found[name].shape == before[key].shape


def test_a_centre_of_the_last_merge_changes_the_next_one(home: Path) -> None:
    recipe = attacked("{sign-flip: {scale: 2}}", "{centred-clipping: {iterations: 1}}", "federation.rounds=2")
    clipped, mean = execute(recipe, run="clipped"), execute(attacked("{sign-flip: {scale: 2}}"), run="mean")
    assert clipped.hashes[1:] != mean.hashes[1:]
    moved = {name: state(clipped, 2)[name] - state(clipped, 1)[name] for name in state(clipped, 2)}
    first = {name: state(clipped, 1)[name] - state(clipped, 0)[name] for name in moved}
    agreement = sum(float((moved[name] * first[name]).sum()) for name in moved)
    assert agreement > 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("merge=[{krum: {f: 2}}]",), "krum needs at least 7 models, but a round brings 4 at most; raise"),
        (("merge=[bulyan]", "devices=[{count: 6}]"), "bulyan needs at least 7 models, but a round brings 6"),
        (("merge=[{krum: {f: 0}}]",), "krum: f is 0"),
        (("merge=[{multi-krum: {m: 0}}]",), "multi-krum: m is 0"),
        (("merge=[{multi-krum: {m: 9}}]", "devices=[{count: 9}]"), "multi-krum needs at least 10 models"),
        (("merge=[{centred-clipping: {radius: .nan}}]",), "centred-clipping: radius is nan"),
        (("merge=[fltrust]",), r"root_data is not set; set fltrust: \{root_data: validation\}"),
        (
            (
                "merge=[{fltrust: {root_data: validation}}]",
                "train.techniques=[full, {batch-norm-statistics: {local: true}}]",
                "evaluation.local_holdout=0.2",
            ),
            "merge: fltrust needs a whole model, but batch-norm-statistics keeps some tensors on devices",
        ),
        (("merge=[{fltrust: {root_data: 'sample:digits'}}]",), "root_data sample:digits is also a source of the run"),
        (("devices=[{name: bad, count: 2, attack: {sign-flip: {scale: 0}}}]",), "bad: attack, sign-flip: scale is 0"),
        (("devices=[{count: 2}, {count: 2, attack: sign-flip}]",), "two classes are called device; name them apart"),
        (("devices=[{name: bad, count: 2, attack: {noise: {scale: .inf}}}]",), "bad: attack, noise: scale is inf"),
        (("devices=[{name: bad, count: 2, attack: sign-flop}]",), "there is no 'sign-flop'; did you mean 'sign-flip'"),
    ],
)
def test_what_cannot_hold_is_refused_before_anything_begins(
    home: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        trivial(*overrides)


@pytest.mark.parametrize("merge", ["krum", "median", "centred-clipping", "bulyan"])
def test_a_robust_merge_of_both_factors_of_low_rank_pairs_is_refused(merge: str) -> None:
    recipe = parse_recipe(TEXT, "a", ["train.techniques=[{lora: {exact: both}}]", f"merge=[{merge}]"])
    with pytest.raises(RecipeError, match=f"merge: {merge} takes tensors, but lora sends pairs; .* train one factor"):
        resolve_recipe(recipe.model_copy(update={"devices": [recipe.devices[0].model_copy(update={"count": 9})]}))


def test_labels_are_changed_only_where_examples_have_one_class() -> None:
    text = TEXT.replace("task: text-classification", "task: text-generation")
    recipe = parse_recipe(text, "a", ["devices=[{name: bad, count: 3, attack: label-flip}]"])
    with pytest.raises(RecipeError, match="bad: label-flip changes classes, and text-generation has none"):
        resolve_recipe(recipe)


def test_a_robust_merge_with_too_few_updates_left_fails_its_round(home: Path) -> None:
    def fail(message: Message, reply: Message) -> Message:
        raise ValueError

    recipe = trivial("devices=[{count: 5}]", "merge=[krum]")
    ended = execute(recipe, spoilt(fail, {2}, rounds={1}))
    assert [record.status for record in ended.rounds] == ["completed", "failed", "completed"]
    assert "krum with f 1 needs at least 5 models, but 4 were given; lower f or add models" in ended.rounds[1].reason


def test_fltrust_that_trusts_nobody_fails_its_rounds(home: Path) -> None:
    recipe = attacked("sign-flip", "{fltrust: {root_data: validation}}", good=1, bad=3)
    recipe = recipe.model_copy(update={"devices": recipe.devices[1:]})
    with pytest.raises(RunError, match="no round got enough"):
        execute(recipe)
    assert "fltrust trusts no update" in outcome().rounds[1].reason


def test_runs_show_names_the_attackers(home: Path) -> None:
    execute(attacked("sign-flip", "median", "federation.rounds=1"))
    shown = CliRunner().invoke(runs, ["show", "latest"]).output
    assert "2 of bad by sign-flip" in shown
    assert "client 5 (bad)" not in shown


def test_real_devices_never_attack(home: Path) -> None:
    """Neither a server that is sent such a recipe, nor one that has such a run, nor a device that is asked."""
    recipe, refusal = (
        attacked("sign-flip"),
        "bad attacks by sign-flip, which only simulated clients may; run the recipe",
    )
    with Store.open() as store, pytest.raises(RecipeError, match=refusal):
        operating(store, Audit()).submit_run("ada", asking(), {"recipe": recipe.model_dump(mode="json")})
    with pytest.raises(RecipeError, match=refusal):
        deployed(recipe, lambda client, number: 1.0)
    request = TrainRequest(recipe.model_dump_json(), 1, 0, "run-1", '["0", "1"]')
    with pytest.raises(RecipeError, match=refusal) as caught:
        LocalData("partition:0").get_context(request)
    assert problem_of(caught.value).sentence == "the recipe has an attack, which only simulated clients may make"


def test_the_attacks_by_hand() -> None:
    allied = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])]
    tensor = AttackedTensor(allied[0], allied, 6, seed=3)
    assert SignFlip(scale=2.0).change_delta(tensor).tolist() == [-2.0, -4.0]
    assert ModelReplacement().change_delta(tensor).tolist() == [3.0, 6.0]
    assert ModelReplacement(boost=0.5, label=9).change_labels(torch.tensor([0, 1, 2]), 3).tolist() == [2, 2, 2]
    assert LabelFlip().change_labels(torch.tensor([0, 1, 2, 4]), 5).tolist() == [4, 3, 2, 0]
    assert ALittleIsEnough(z=2.0).change_delta(tensor).tolist() == [0.0, 2.0]
    drawn = Noise(scale=4.0).change_delta(AttackedTensor(torch.full((20_000,), -0.5), [], 2, seed=3))
    assert float(drawn.std()) == pytest.approx(2.0, rel=0.02)
    assert torch.equal(Noise().change_delta(tensor), Noise().change_delta(tensor))
    assert not torch.equal(Noise().change_delta(tensor), Noise().change_delta(tensor._replace(seed=4)))


@pytest.mark.parametrize(
    ("updates", "attackers", "below"), [(50, 24, 24 / 26), (10, 3, 4 / 7), (10, 5, 0.8), (4, 3, 0.5)]
)
def test_the_largest_z_of_a_little_is_enough(updates: int, attackers: int, below: float) -> None:
    """Of 50 workers 24 are corrupted, 2 of 26 have to support them, and z is that of 24/26."""
    assert compute_largest_z(updates, attackers) == pytest.approx(NormalDist().inv_cdf(below) if below > 0.5 else 0.0)


@pytest.mark.parametrize("merge", ["centred-clipping", "{fltrust: {root_data: validation, root_examples: 20}}"])
def test_a_merge_beside_a_delta_of_the_server_is_the_same_on_real_devices(home: Path, merge: str) -> None:
    recipe = trivial(f"merge=[{merge}]", "devices=[{count: 3}]")
    simulated, real = execute(recipe, run="simulated"), deployed(recipe, lambda client, number: 1.0, run="real")
    assert simulated.hashes == [record.checkpoint.sha256 for record in real if record.checkpoint]


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.techniques=[{lora: {trained_factors: alternate}}]", "federation.rounds=4"),
        ("train.techniques=[{dynamic-pruning: {density: 0.8}}]", "federation.rounds=3"),
        ("train.techniques=[full]", "devices=[{name: big, count: 3}, {name: small, count: 3, techniques: [bias]}]"),
    ],
    ids=["one factor in turns", "masked weights", "classes that train different tensors"],
)
def test_a_centre_fits_what_clients_train_in_each_round(home: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = words(tmp_path, "devices=[{count: 3}]", "merge=[centred-clipping]", "train.optimiser=sgd", *overrides)
    ended = execute(recipe)
    assert {record.status for record in ended.rounds} == {"completed"}
    assert len(set(ended.hashes)) == len(ended.hashes)


def accuracy(ended: Ended) -> float:
    [found] = [one.value for one in ended.rounds[-1].metrics if (one.split, one.name) == ("validation", "accuracy")]
    return found


def test_two_of_seven_clients_that_turn_back_ruin_the_mean_and_not_a_robust_merge(home: Path) -> None:
    more = ("federation.rounds=5", "train.lr=0.1", "train.local_steps=4")
    honest = execute(trivial("devices=[{count: 7}]", *more), run="honest")
    mean = execute(attacked("{sign-flip: {scale: 4}}", "mean", *more), run="mean")
    robust = execute(attacked("{sign-flip: {scale: 4}}", "{multi-krum: {f: 2, m: 5}}", *more), run="robust")
    assert accuracy(mean) < 0.3 < 0.7 < accuracy(honest)
    assert accuracy(robust) > accuracy(honest) - 0.03


def test_a_centre_of_the_last_merge_goes_with_no_server_optimiser() -> None:
    with pytest.raises(
        RecipeError, match="centred-clipping compares updates with what the last merge gave, and fedavgm"
    ):
        trivial("merge=[centred-clipping, fedavgm]")
