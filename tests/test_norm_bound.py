"""One client cannot destroy a run: updates out of proportion, merges that give no finite values, too few to merge."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedtune.errors import RecipeError, RunError
from fedtune.recipe.schema import Recipe
from fedtune.server.norm_bound import median_size, yardstick
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import Store
from fedtune.wire.client_update import decode_tensors, pack
from tests.federations import Ended, Spoil, begin, execute, order_of, outcome, silent, spoilt, trivial, words
from tests.test_buffered import deployed
from tests.test_rounds import answer, payload_of

Deltas = dict[str, Tensor]


def changed(change: Callable[[Deltas], Mapping[str, Tensor]]) -> Spoil:
    """The honest update and report with other deltas."""
    return lambda message, reply: answer(
        message, pack(change(decode_tensors(payload_of(reply)))), dict(reply.content.metric_records["report"])
    )


def times(factor: float) -> Spoil:
    return changed(lambda deltas: {name: delta * factor for name, delta in deltas.items()})


HUGE = changed(lambda deltas: {name: torch.full_like(delta, 3e38) for name, delta in deltas.items()})
ZERO = times(0.0)


def statuses(ended: Ended) -> list[list[str]]:
    return [[sent.status for sent in record.client_records] for record in ended.rounds[1:]]


@pytest.mark.parametrize("spoil", [HUGE, times(1e4), times(-1000.0)], ids=["3e38", "10,000 times", "-1000 times"])
def test_by_default_an_update_out_of_proportion_is_refused_and_named(home: Path, spoil: Spoil) -> None:
    recipe = trivial()
    ended = execute(recipe, spoilt(spoil, {1}), run="attacked")
    assert statuses(ended) == [["merged", "rejected", "merged", "merged"]] * 2
    bad = ended.rounds[1].client_records[1]
    assert "times as large as the median of the cohort, but federation.norm_bound allows a factor of 50" in bad.reason
    assert (bad.num_examples, bad.update_norm > 0, bad.bytes_up > 0) == (0, True, True)

    def raising(message: Message, reply: Message) -> Message:
        raise ValueError

    assert ended.hashes == execute(recipe, spoilt(raising, {1}), run="without").hashes


def test_honest_runs_keep_the_bits_they_had_without_a_bound(home: Path) -> None:
    bounded = execute(trivial(), run="bounded")
    free = execute(trivial("federation.norm_bound=null"), run="free")
    assert bounded.hashes == free.hashes


def test_the_bound_is_off_by_its_key_and_no_other_check_is(home: Path) -> None:
    ended = execute(trivial("federation.norm_bound=null"), spoilt(times(1e4), {1}))
    assert statuses(ended) == [["merged"] * 4] * 2


def test_a_resumed_run_compares_with_the_same_rounds(home: Path) -> None:
    """One client a round has no cohort: what earlier rounds merged stands in, also after a kill."""
    recipe = trivial("devices=[{count: 1}]", "federation.rounds=4")
    whole = execute(recipe, spoilt(times(1e4), {0}, rounds={3}), run="whole")
    assert statuses(whole) == [["merged"], ["merged"], ["rejected"], ["merged"]]
    assert whole.rounds[3].status == "failed"
    assert whole.hashes[2] == whole.hashes[3] != whole.hashes[4]
    stops = [3]

    def stop(message: Message, reply: Message) -> Message:
        if order_of(message)[0] in stops:
            stops.clear()
            raise KeyboardInterrupt
        return times(1e4)(message, reply)

    client = spoilt(stop, {0}, rounds={3})
    with Store.open() as store, silent():
        run = begin(store, recipe, "stopped")
        with pytest.raises(KeyboardInterrupt):
            run_to_completion(InProcessGrid(1, SequentialWorkers(client)), store, run)
        store.reopen(run)
        run_to_completion(InProcessGrid(1, SequentialWorkers(client)), store, run)
    assert outcome("stopped").hashes == whole.hashes
    assert statuses(outcome("stopped")) == statuses(whole)


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_honest_clients_are_never_refused(home: Path, count: int) -> None:
    ended = execute(trivial(f"devices=[{{count: {count}}}]", "federation.rounds=3"))
    assert statuses(ended) == [["merged"] * count] * 3


@pytest.mark.parametrize("zeros", [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}])
def test_updates_of_zeros_do_not_make_the_others_outliers(home: Path, zeros: set[int]) -> None:
    ended = execute(trivial("federation.rounds=1"), spoilt(ZERO, zeros))
    assert statuses(ended) == [["merged"] * 4]


def test_classes_that_train_few_tensors_compare_with_those_that_train_many(home: Path, tmp_path: Path) -> None:
    classes = "devices=[{name: big, count: 3}, {name: small, count: 1, techniques: [bias]}]"
    recipe = words(tmp_path, classes, "train.techniques=full", "train.optimiser=sgd", "federation.rounds=1")
    honest = execute(recipe, run="honest")
    assert statuses(honest) == [["merged"] * 4]
    norms = [sent.update_norm for sent in honest.rounds[1].client_records]
    attacked = execute(recipe, spoilt(times(500 * max(norms) / norms[3]), {3}), run="attacked")
    assert statuses(attacked) == [["merged"] * 3 + ["rejected"]]


@pytest.mark.parametrize(
    "overrides", [("train.techniques=lora",), ("train.techniques=[{dynamic-pruning: {density: 0.8}}]",)]
)
def test_low_rank_and_masked_updates_are_bounded_too(home: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    recipe = words(tmp_path, "devices=[{count: 4}]", *overrides)
    assert statuses(execute(recipe, run="honest")) == [["merged"] * 4] * 2
    attacked = execute(recipe, spoilt(times(1e5), {2}), run="attacked")
    assert statuses(attacked) == [["merged", "merged", "rejected", "merged"]] * 2


def test_late_answers_are_bounded_on_devices_as_in_a_simulation(home: Path) -> None:
    recipe = trivial("federation.asynchronous={buffer: 4}", "federation.rounds=3", "train.local_steps=1")
    spoil = spoilt(times(1e4), {1})
    simulated = execute(recipe, spoil, run="simulated")
    rounds = deployed(recipe, lambda client, number: 1.0, spoil, run="real")
    assert statuses(simulated) == [["merged", "rejected", "merged", "merged"]] * 3
    assert [[sent.status for sent in record.client_records] for record in rounds[1:]] == statuses(simulated)
    assert outcome("real").hashes == simulated.hashes


def test_the_yardstick_by_hand() -> None:
    assert yardstick([1.0, 2.0, 9.0], 0.0) == 2
    assert yardstick([1.0, 2.0, 4.0, 9.0], 0.0) == 3
    assert yardstick([1.0, 2.0, 9.0], 5.0) == 5
    assert yardstick([0.0, 0.0, 0.0, 5.0], 0.0) == math.inf
    assert yardstick([7.0, 0.0], 1.0) == 1
    assert yardstick([7.0, 8.0], 0.0) == yardstick([0.0, 0.0], 0.0) == yardstick([], 0.0) == math.inf
    assert median_size([0.0, 3.0, 1.0]) == 2
    assert median_size([]) == median_size([0.0]) == 0


def test_a_client_that_still_has_much_to_learn_when_the_others_have_little_is_no_outlier(home: Path) -> None:
    """Three clients all but stop after the first round; the fourth goes on as all began."""
    recipe = trivial("federation.rounds=3")
    ended = execute(recipe, spoilt(times(1e-6), {0, 1, 2}, rounds={2, 3}))
    assert statuses(ended) == [["merged"] * 4] * 3


def test_the_median_of_each_round_is_in_the_store(home: Path) -> None:
    ended = execute(trivial())
    for record in ended.rounds[1:]:
        told = [metric.value for metric in record.metrics if metric.name == "median_rms"]
        values = 784 * 10 + 10
        norms = sorted(sent.update_norm for sent in record.client_records)
        assert told == [pytest.approx((norms[1] + norms[2]) / 2 / math.sqrt(values))]


def test_a_round_s_line_names_who_was_refused(home: Path) -> None:
    from fedtune.server.events import format_round

    ended = execute(trivial("federation.rounds=1"), spoilt(HUGE, {1}))
    assert "rejected toy (client 1)" in format_round(ended.rounds[1])


def test_a_merge_that_gives_no_finite_values_fails_its_round_and_the_state_stays(home: Path) -> None:
    """Two updates that are each finite add up to infinity."""
    recipe = trivial("devices=[{count: 2}]", "merge=[{task-arithmetic: {scale: 10}}]", "federation.norm_bound=null")
    ended = execute(recipe, spoilt(HUGE, {0, 1}, rounds={1}))
    assert [record.status for record in ended.rounds] == ["completed", "failed", "completed"]
    assert "values in" in ended.rounds[1].reason
    assert "not finite; the state stays as it was" in ended.rounds[1].reason
    assert ended.hashes[0] == ended.hashes[1] != ended.hashes[2]
    assert statuses(ended)[0] == ["unused", "unused"]
    assert all(bool(tensor.isfinite().all()) for tensor in unpacked(ended))


def unpacked(ended: Ended) -> list[Tensor]:
    from tests.test_rounds import state

    return list(state(ended, len(ended.rounds) - 1).values())


def robust(*overrides: str) -> Recipe:
    return trivial("devices=[{count: 5}]", "merge=[trimmed-mean]", *overrides)


def test_a_robust_merge_with_too_few_updates_left_fails_its_round_and_the_run_goes_on(home: Path) -> None:
    ended = execute(robust(), spoilt(HUGE, {1}, rounds={1}))
    failed, completed = ended.rounds[1:]
    assert (failed.status, completed.status, ended.run.status) == ("failed", "completed", "completed")
    assert failed.reason.startswith(
        "the merge failed: merge: trimmed-mean with trim_fraction 0.2 needs at least 5 models"
    )
    assert "rejected: its values are" in failed.reason
    assert [sent.status for sent in failed.client_records] == ["unused", "rejected", "unused", "unused", "unused"]
    assert ended.hashes[0] == ended.hashes[1] != ended.hashes[2]


def test_a_robust_merge_that_never_gets_enough_ends_as_every_run_without_a_round(home: Path) -> None:
    with pytest.raises(RunError, match="no round got enough"):
        execute(robust(), spoilt(HUGE, {1}))
    assert [record.status for record in outcome().rounds] == ["completed", "failed", "failed"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("merge=[trimmed-mean]",), "trimmed-mean needs at least 5 models, but a round brings 4 at most"),
        (("merge=[{trimmed-mean: {share: 0.1}}]", "devices=[{count: 9}]"), "at least 10 models, but a round brings 9"),
        (("merge=[model-stock]", "federation.clients_per_round=1"), "needs at least 2 models, but a round brings 1"),
        (
            ("merge=[trimmed-mean]", "devices=[{count: 9}]", "federation.asynchronous={buffer: 4}"),
            "raise federation.asynchronous.buff",
        ),
        (("merge=[slerp]",), "slerp takes 2 models, but a round asks for 4; lower federation.clients_per_round"),
    ],
)
def test_what_can_never_hold_is_refused_before_anything_begins(
    home: Path, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(RecipeError, match=sentence):
        trivial(*overrides)


@pytest.mark.parametrize("share", [0.2, 0.1, 0.3, 1 / 3, 0.49, 0.05, 0.07])
def test_what_trimmed_mean_needs_is_the_least_count_of_which_it_can_cut_one(share: float) -> None:
    from fedtune.merging.combine.trimmed_mean import TrimmedMean

    step: Any = TrimmedMean(trim_fraction=share)
    assert step._cut(step.required_models) >= 1
    assert step._cut(step.required_models - 1) == 0


@pytest.mark.parametrize("count", [1, 2])
def test_an_update_that_no_weights_are_is_refused_also_where_there_is_nothing_to_compare_with(
    home: Path, count: int
) -> None:
    recipe = trivial(f"devices=[{{count: {count}}}]", "federation.rounds=2")
    ended = execute(recipe, spoilt(HUGE, {0}, rounds={1}))
    [first, *_] = ended.rounds[1].client_records
    assert (first.status, first.client) == ("rejected", 0)
    assert "too large for weights" in first.reason
    assert ended.run.status == "completed"
