"""A run with privacy that is killed repeats its noise and its accounting; nobody without its secret does."""

import signal
from pathlib import Path

import pytest

from fedtune import checkpoint, files
from fedtune import paths as homes
from fedtune.device.client_app import app
from fedtune.recipe.schema import Recipe
from fedtune.server.privacy_accounting import compute_epsilon
from fedtune.server.server_app import run_to_completion
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import RoundRecord, Store, claim_run
from tests.federations import TRIVIAL, begin, execute, outcome, silent
from tests.kills import start
from tests.private_federations import CLIP, NOISE, epsilons, private


class KilledError(Exception):
    """Stands for the end of a process before the second round is committed."""


def carried(recipe: Recipe) -> None:
    """Go on with run-1 in this home."""
    with Store.open() as store, claim_run("run-1"), silent():
        run_to_completion(InProcessGrid(recipe.num_clients, SequentialWorkers(app)), store, "run-1")


def cut_off(recipe: Recipe) -> None:
    """Begin run-1 in this home, and end before its second round is committed."""
    real = Store.commit_round

    def commit_round(store: Store, run: str, record: RoundRecord) -> None:
        if record.number == 2:
            raise KilledError
        real(store, run, record)

    with Store.open() as store:
        begin(store, recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "commit_round", commit_round)
        with pytest.raises(KilledError):
            carried(recipe)


@pytest.mark.parametrize(("where", "secrets"), [("server", 1), ("client", 4)])
def test_an_interrupted_run_ends_in_the_bits_of_one_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, where: str, secrets: int
) -> None:
    recipe = private(where)
    alone = execute(recipe)
    keys = {path.relative_to(home): path.read_bytes() for path in home.rglob("noise.key")}
    assert len(set(keys.values())) == len(keys) == secrets
    monkeypatch.setenv("FEDTUNE_HOME", str(home / "other"))
    for path, content in keys.items():
        files.write_bytes_atomically(home / "other" / path, content)
    cut_off(recipe)
    carried(recipe)
    resumed = outcome("run-1")
    assert resumed.hashes == alone.hashes
    assert epsilons(resumed) == epsilons(alone)


@pytest.mark.parametrize("where", ["server", "client"])
def test_nobody_finds_the_same_weights_without_the_secret(
    home: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    recipe = private(where, "federation.rounds=1")
    alone = execute(recipe)
    monkeypatch.setenv("FEDTUNE_HOME", str(home / "other"))
    other = execute(recipe)
    assert other.hashes[0] == alone.hashes[0]
    assert other.hashes[1] != alone.hashes[1]


def test_a_run_killed_between_checkpoint_and_commit_makes_the_same_checkpoint_again(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{TRIVIAL}privacy: {{clipping_norm: {CLIP}, noise_multiplier: {NOISE}}}\n", encoding="utf-8")
    process = start(home, "simulate", str(path), "--json", plant="before the commit")
    process.join()
    assert process.exitcode == -signal.SIGKILL, (home / "printed").read_text()
    stopped = outcome()
    assert [record.number for record in stopped.rounds] == [0, 1]
    left = checkpoint.hash_tensors(
        checkpoint.read_checkpoint(homes.get_runs_folder() / stopped.run.id / "round-0002.safetensors")
    )
    process = start(home, "simulate", "--resume", "latest", "--json")
    process.join()
    assert process.exitcode == 0, (home / "printed").read_text()
    ended = outcome()
    assert ended.hashes[2] == left
    recipe = private("server")
    assert epsilons(ended) == [compute_epsilon(recipe, count) for count in (1, 2)]
