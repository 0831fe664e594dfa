"""Which checkpoints stay, that nothing else goes, and what is said of a round that was pruned."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fedtune import paths as homes
from fedtune.cli.main import cli
from fedtune.errors import RecipeError, StoreError
from fedtune.recipe.checkpoint_settings import Keep
from fedtune.recipe.schema import Recipe
from fedtune.server.pruning import prune_checkpoints
from fedtune.simulation import resolve_recipe
from fedtune.tracking import Store, pruning
from fedtune.tracking.pruning import (
    find_checkpointed_round,
    list_kept_rounds,
    prune_run_checkpoints,
    select_prunable_rounds,
)
from tests.data_examples import a_recipe
from tests.federations import execute, outcome, trivial
from tests.store_examples import a_metric, a_round, start


def scores(
    values: dict[int, float], part: str = "validation", name: str = "accuracy"
) -> dict[int, dict[tuple[str, str], float]]:
    return {number: {(part, name): value} for number, value in values.items()}


def stay(values: dict[int, dict[tuple[str, str], float]], **keep: object) -> list[int]:
    gone = select_prunable_rounds(values, Keep.model_validate(keep), {})
    return [number for number in values if number not in gone]


RISING = {number: number / 100 for number in range(25)}


def test_by_default_the_last_two_the_best_every_tenth_and_the_start_stay() -> None:
    assert stay(scores(RISING)) == [0, 10, 20, 23, 24]
    assert stay(scores({**RISING, 7: 0.9})) == [0, 7, 10, 20, 23, 24]


def test_each_can_be_set() -> None:
    peak = scores({**RISING, 7: 0.9})
    assert stay(peak, best=False) == [0, 10, 20, 23, 24]
    assert stay(peak, every=None) == [0, 7, 23, 24]
    assert stay(peak, every=4, last=1) == [0, 4, 7, 8, 12, 16, 20, 24]
    assert stay(peak, last=100) == list(range(25))


@pytest.mark.parametrize("name", ["loss", "perplexity"])
def test_of_losses_the_least_is_the_best_and_of_equals_the_first(name: str) -> None:
    values = dict.fromkeys(range(9), 5.0) | {3: 1.0, 5: 1.0}
    assert stay(scores(values, name=name)) == [0, 3, 7, 8]


def test_the_best_is_told_by_validation_and_else_by_what_clients_hold_out() -> None:
    of = scores({1: 0.2, 2: 0.9, 3: 0.1, 4: 0.1, 5: 0.1}, part="local")
    assert stay(of) == [2, 4, 5]
    of[3]["validation", "accuracy"] = 0.3
    assert stay(of) == [3, 4, 5]
    of[1]["validation", "accuracy"] = float("nan")
    assert stay(of) == [3, 4, 5]


def test_without_any_score_none_is_the_best() -> None:
    assert stay({number: {} for number in range(5)}) == [0, 3, 4]


def files(run: str = "run-1") -> list[int]:
    return sorted(
        int(path.stem.removeprefix("round-")) for path in (homes.get_runs_folder() / run).glob("round-*.safetensors")
    )


ROUNDS = "federation.rounds=6"
SPARSE = "checkpoints={keep: {last: 1, best: false, every: 4}}"


def test_a_run_leaves_what_its_recipe_keeps_and_the_same_bits_as_one_that_keeps_all(home: Path) -> None:
    whole = execute(trivial(ROUNDS, "checkpoints={keep: all}"), run="whole")
    assert files("whole") == [0, 1, 2, 3, 4, 5, 6]
    pruned = execute(trivial(ROUNDS, SPARSE))
    assert files() == [0, 4, 6]
    assert list_kept_rounds(pruned.rounds) == [0, 4, 6]
    assert pruned.hashes == whole.hashes


def test_a_run_killed_before_or_while_it_prunes_is_tidied_when_it_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    recipe = trivial(ROUNDS, SPARSE)
    with monkeypatch.context() as patched:
        patched.setattr(pruning, "suppress", die)  # marked, but not yet gone
        with pytest.raises(KeyboardInterrupt):
            execute(recipe)
    assert files() == [0, 1, 2]
    assert list_kept_rounds(outcome().rounds) == [0, 2]
    assert CliRunner().invoke(cli, ["simulate", "--resume", "latest"], catch_exceptions=False).exit_code == 0
    assert files() == [0, 4, 6]
    alone = execute(recipe, run="alone")
    assert outcome("run-1").hashes == alone.hashes


def test_a_checkpoint_is_pruned_only_after_its_successor_is_committed(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    real = pruning.select_prunable_rounds

    def look(scores: dict[int, object], keep: Keep, recipe: dict[str, Any]) -> list[int]:
        seen.append((outcome("run-1").rounds[-1].number, files()))
        return real(scores, keep, recipe)  # type: ignore[arg-type]

    monkeypatch.setattr(pruning, "select_prunable_rounds", look)
    execute(trivial(SPARSE))
    assert seen == [(0, [0]), (1, [0, 1]), (2, [0, 1, 2])]


def test_what_asks_for_a_pruned_round_is_told_which_are_there(home: Path, tmp_path: Path) -> None:
    execute(trivial(ROUNDS, SPARSE))
    sentence = "round 3 of run run-1 was pruned, as checkpoints.keep says; it has the checkpoints of rounds 0, 4 and 6"
    for argv in (
        ["evaluate", "latest", "--round", "3"],
        ["merge", "run:latest@3", "run:latest@6", "--method", "linear", "-o", str(tmp_path / "out")],
    ):
        result = CliRunner().invoke(cli, argv)
        assert sentence in str(result.exception) + result.output, argv
    printed = CliRunner().invoke(cli, ["runs", "show", "latest"], catch_exceptions=False).output
    assert "(rounds kept: 0, 4, 6)" in " ".join(printed.split())
    shown = json.loads(CliRunner().invoke(cli, ["runs", "show", "latest", "--json"], catch_exceptions=False).output)
    assert [one["checkpoint"]["pruned"] for one in shown["rounds"]] == [False, True, True, True, False, True, False]


def test_a_copy_of_a_pruned_checkpoint_can_still_be_read(home: Path, tmp_path: Path) -> None:
    execute(trivial(ROUNDS, "checkpoints={keep: all}"))
    copy = tmp_path / "run-1" / "round-0003.safetensors"
    copy.parent.mkdir()
    copy.write_bytes((homes.get_runs_folder() / "run-1" / "round-0003.safetensors").read_bytes())
    with Store.open() as store:
        assert prune_run_checkpoints(store, "run-1", Keep(last=1, best=False, every=None), {}) == [1, 2, 3, 4, 5]
    assert CliRunner().invoke(cli, ["evaluate", str(copy)], catch_exceptions=False).exit_code == 0


def test_late_answers_keep_the_checkpoints_they_begin_with(home: Path) -> None:
    late = "federation={rounds: 1, late: {buffer: 2, oldest: 5}}"
    recipe = resolve_recipe(
        a_recipe("train.techniques=[full]", late, "checkpoints={keep: {last: 1, best: false, every: null}}")
    )
    with Store.open() as store:
        start(store)
        for number in range(12):
            store.commit_round("film-1a2b", a_round(number, metrics=(a_metric(0.5),)))
        prune_checkpoints(store, "film-1a2b", recipe)
        assert list_kept_rounds(store.rounds("film-1a2b")) == [0, 5, 6, 7, 8, 9, 10, 11]


def test_sentences_for_runs_without_the_round_or_any_checkpoint() -> None:
    rounds = [a_round(0), a_round(1, checkpoint=None)]
    with pytest.raises(
        StoreError, match=r"has not recorded a checkpoint of round 1; it has the checkpoints of round 0"
    ):
        find_checkpointed_round("r", rounds, 1)
    with pytest.raises(StoreError, match=r"has not recorded a checkpoint of round 7; it has the"):
        find_checkpointed_round("r", rounds, 7)
    with pytest.raises(StoreError, match=r"has not recorded a checkpoint; it has no checkpoint at all"):
        find_checkpointed_round("r", rounds[1:])
    assert find_checkpointed_round("r", rounds).number == 0


def test_a_recipe_says_what_to_keep() -> None:
    assert a_recipe().checkpoints.keep == Keep(last=2, best=True, every=10)
    assert Recipe.model_validate_json(a_recipe("checkpoints.keep=all").model_dump_json()).checkpoints.keep == "all"
    with pytest.raises(RecipeError, match="last"):
        a_recipe("checkpoints.keep={last: 0}")
