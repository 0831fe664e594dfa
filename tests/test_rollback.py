"""A run taken back to an earlier round goes on from there as if nothing had come after."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from fedtune import paths as homes
from fedtune.cli.runs import runs
from fedtune.device.client_app import app
from fedtune.errors import StoreError
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import Store, claim_run
from fedtune.tracking.rollback import rollback_run
from tests.federations import begin, execute, outcome, silent, trivial


def files() -> list[str]:
    return sorted(path.name for path in (homes.get_runs_folder() / "run-1").glob("*.safetensors"))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_run_rolled_back_and_resumed_ends_with_the_bits_it_had(home: Path, number: int) -> None:
    recipe = trivial("federation.rounds=4", "train.local_steps=1", "checkpoints.keep=all")
    whole = execute(recipe)
    with Store.open() as store:
        assert rollback_run(store, "run-1", number) == 4 - number
        taken = outcome("run-1")
        assert [record.number for record in taken.rounds] == list(range(number + 1))
        assert taken.hashes == whole.hashes[: number + 1]
        assert taken.run.status == "interrupted"
        assert taken.run.reason == f"rolled back to round {number}; {4 - number} rounds removed"
        assert files() == [f"round-{one:04d}.safetensors" for one in range(number + 1)]
        store.reopen("run-1")
        with silent():
            run_to_completion(InProcessGrid(4, SequentialWorkers(app)), store, "run-1")
    assert outcome("run-1").hashes == whole.hashes
    assert [record.metrics for record in outcome("run-1").rounds] == [record.metrics for record in whole.rounds]


def test_a_round_whose_checkpoint_was_pruned_is_refused_and_the_others_are_named(home: Path) -> None:
    execute(
        trivial("federation.rounds=5", "train.local_steps=1", "checkpoints={keep: {last: 1, best: false, every: null}}")
    )
    with Store.open() as store, pytest.raises(StoreError, match=r"was pruned, .* the checkpoints of rounds 0 and 5"):
        rollback_run(store, "run-1", 3)


def test_going_back_to_the_newest_round_changes_nothing(home: Path) -> None:
    before = execute(trivial())
    with Store.open() as store:
        assert rollback_run(store, "run-1", 2) == 0
    assert outcome("run-1") == before


def test_a_round_that_is_not_there_or_whose_checkpoint_is_damaged_is_refused(home: Path) -> None:
    before = execute(trivial())
    with Store.open() as store:
        with pytest.raises(
            StoreError,
            match=r"has not recorded a checkpoint of round 7; it has the checkpoints of rounds 0, 1 and 2",
        ):
            rollback_run(store, "run-1", 7)
        (homes.get_runs_folder() / "run-1" / "round-0001.safetensors").write_bytes(b"damaged")
        with pytest.raises(StoreError, match="is not a safetensors checkpoint"):
            rollback_run(store, "run-1", 1)
        (homes.get_runs_folder() / "run-1" / "round-0000.safetensors").unlink()
        with pytest.raises(StoreError, match="is missing"):
            rollback_run(store, "run-1", 0)
    assert outcome("run-1") == before


def test_a_run_that_is_executed_queued_or_kept_by_a_server_must_be_stopped_first(home: Path) -> None:
    execute(trivial())
    with Store.open() as store:
        with claim_run("run-1"), pytest.raises(StoreError, match="is being executed by another process"):
            rollback_run(store, "run-1", 1)
        store.finish("run-1", "queued")
        with pytest.raises(StoreError, match="is queued; stop it first: fedtune runs stop run-1"):
            rollback_run(store, "run-1", 1)
        run = begin(store, trivial(), "served", engine="devices")
        with pytest.raises(StoreError, match="run served is running; stop it first"):
            rollback_run(store, run, 1)
        store.finish(run, "interrupted")
        with pytest.raises(StoreError, match="has not recorded a checkpoint of round 1; it has no checkpoint at all"):
            rollback_run(store, run, 1)
    assert len(outcome("run-1").rounds) == 3


def test_what_a_private_run_told_stays_counted(home: Path) -> None:
    execute(trivial("privacy={clip: 1.0, noise: 1.0}"))
    with Store.open() as store, pytest.raises(StoreError, match="has privacy, and the epsilon"):
        rollback_run(store, "run-1", 0)


def test_the_command_says_what_it_did_and_asks_first(home: Path) -> None:
    execute(trivial())
    declined = CliRunner().invoke(runs, ["rollback", "latest", "--round", "1"], input="n\n")
    assert declined.exit_code == 1
    assert len(outcome("run-1").rounds) == 3
    done = CliRunner().invoke(runs, ["rollback", "latest", "--round", "1", "--yes"])
    assert done.exit_code == 0
    assert done.output == "rolled back: run-1 to round 1, 1 removed; next: fedtune simulate --resume run-1\n"
    again = CliRunner().invoke(runs, ["rollback", "latest", "--round", "5", "--yes", "--json"])
    assert again.exit_code != 0
