"""Privacy on the path of a round: what is sent, what is believed, what comes of it; killed runs repeat it."""

import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from torch import Tensor

from clients.app import app
from clients.private import private as made_private
from clients.supply import holding
from fedtune import checkpoint, files
from fedtune import home as homes
from fedtune.contribution import Order, pack, unpack
from fedtune.errors import ContributionError
from fedtune.privacy import SLACK
from fedtune.recipe import Privacy, Recipe
from fedtune.simulation.local_grid import LocalGrid
from fedtune.simulation.workers import InTurn
from fedtune.tracking import RoundRecord, Store, claim
from fedtune.training import workshop
from server.accounting import epsilon
from server.app import carry
from tests.federations import TRIVIAL, begin, execute, order_of, outcome, silent, spoilt
from tests.kills import start
from tests.private_federations import CLIP, NOISE, Sent, epsilons, keeping, key_of, private, state

ORDER = Order("", 1, 0, run="run-1")


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().reshape(-1) for name in sorted(tensors)])


def test_the_servers_noise_is_all_that_lies_between_the_mean_of_equals_and_the_new_weights(home: Path) -> None:
    sent: Sent = {}
    ended = execute(private("server"), spoilt(keeping(sent), range(4)))
    left = []
    for number in (1, 2):
        mean = sum(flat(sent[number, client]) for client in range(4)) / 4
        noise = flat(state(ended, number)) - flat(state(ended, number - 1)) - mean
        left.append(noise.numpy() / (NOISE * CLIP / 4))
    count = len(left[0])
    assert count == 7850
    for noise in left:
        assert abs(noise.mean()) < 5 / math.sqrt(count)
        assert abs(noise.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs(np.corrcoef(left)[0, 1]) < 5 / math.sqrt(count), "each round has noise of its own"


def test_clients_clip_before_they_send_and_send_no_noise_where_the_server_adds_it(home: Path) -> None:
    clipped: Sent = {}
    execute(private("server"), spoilt(keeping(clipped), range(4)))
    plain: Sent = {}
    execute(private("server", "privacy=null"), spoilt(keeping(plain), range(4)), run="plain")
    norms = {client: float(flat(plain[1, client]).norm()) for client in range(4)}
    assert min(norms.values()) < CLIP < max(norms.values()), "some are clipped, some are not"
    for client, norm in norms.items():
        assert float(flat(clipped[1, client]).norm()) == pytest.approx(min(norm, CLIP), rel=1e-6)
        expected = flat(plain[1, client]) * min(1.0, CLIP / norm)
        torch.testing.assert_close(flat(clipped[1, client]), expected, rtol=1e-6, atol=1e-12)


def counting(message: Message, reply: Message) -> Message:
    """Client 0 says that it trained on a thousand times as many examples as it did."""
    reply.content.metric_records["report"]["examples"] = 20_000
    return reply


def test_a_client_that_counts_more_examples_weighs_no_more(home: Path) -> None:
    sent: Sent = {}
    keep = keeping(sent)
    app = spoilt(
        lambda message, reply: keep(message, counting(message, reply) if not order_of(message)[1] else reply), range(4)
    )
    ended = execute(private("server", "privacy.noise=1e-6", "federation.rounds=1"), app)
    mean = sum(flat(sent[1, client]) for client in range(4)) / 4
    gone = flat(state(ended, 1)) - flat(state(ended, 0))
    torch.testing.assert_close(gone, mean, rtol=0, atol=1e-7)
    assert [one.examples for one in ended.rounds[1].contributions] == [20_000, 20, 20, 20]


@pytest.mark.parametrize(("factor", "status"), [(1 + SLACK / 2, "merged"), (1.01, "refused")])
def test_a_norm_above_the_bound_is_refused(home: Path, factor: float, status: str) -> None:
    def enlarge(message: Message, reply: Message) -> Message:
        array = reply.content.array_records["delta"]["safetensors"]
        deltas = unpack(array.data)
        norm = float(flat(deltas).norm())
        array.data = pack({name: (tensor.double() * (factor * CLIP / norm)).float() for name, tensor in deltas.items()})
        return reply

    ended = execute(private("server"), spoilt(enlarge, {1}))
    bad = ended.rounds[1].contributions[1]
    assert bad.status == status
    assert (f"above privacy.clip {CLIP}" in bad.reason) == (status == "refused")


def test_clients_noise_covers_each_contribution_and_the_server_adds_none(home: Path) -> None:
    sent: Sent = {}
    ended = execute(private("client"), spoilt(keeping(sent), range(4)))
    plain: Sent = {}
    execute(private("server", "federation.rounds=1"), spoilt(keeping(plain), range(4)), run="plain")
    own = [((flat(sent[1, c]) - flat(plain[1, c])) / (NOISE * CLIP)).numpy() for c in range(4)]
    count = len(own[0])
    for noise in own:
        assert abs(noise.mean()) < 5 / math.sqrt(count)
        assert abs(noise.var() - 1) < 5 * math.sqrt(2 / count)
    assert np.abs(np.corrcoef(own) - np.eye(4)).max() < 5 / math.sqrt(count)
    mean = sum(flat(sent[1, client]) for client in range(4)) / 4
    torch.testing.assert_close(flat(state(ended, 1)) - flat(state(ended, 0)), mean, rtol=0, atol=1e-6)
    assert not key_of("run-1").exists()


def test_a_client_with_its_own_noise_tells_neither_examples_nor_loss_nor_labels(home: Path) -> None:
    recipe = private("client")
    ended = execute(recipe)
    assert {(one.examples, one.loss) for record in ended.rounds[1:] for one in record.contributions} == {(1, 0.0)}
    shop = workshop(recipe.model_dump_json())
    assert holding(shop, shop.clients[0]) == {}
    other = workshop(private("server").model_dump_json())
    assert holding(other, other.clients[0])["examples"] == len(other.clients[0])


def test_the_same_noise_is_never_added_to_two_different_contributions(tmp_path: Path) -> None:
    """Whoever had both could subtract them, and see the difference in clear."""
    own = Privacy(clip=10.0, noise=1.0, where="client")
    one, other = {"t": torch.zeros(50_000)}, {"t": torch.zeros(50_000)}
    other["t"][0] = 1e-3
    noises = [made_private(deltas, {}, own, ORDER, tmp_path)["t"] - deltas["t"] for deltas in (one, other)]
    assert abs(np.corrcoef(torch.stack(noises).numpy())[0, 1]) < 5 / math.sqrt(50_000)
    again = made_private(one, {}, own, ORDER, tmp_path)["t"]
    assert torch.equal(again, noises[0])
    later = made_private(one, {}, own, replace(ORDER, round=2), tmp_path)["t"]
    assert abs(np.corrcoef(torch.stack([again, later]).numpy())[0, 1]) < 5 / math.sqrt(50_000)


def test_a_client_sends_nothing_that_is_neither_clipped_nor_noised(tmp_path: Path) -> None:
    with pytest.raises(ContributionError, match="it would send sums, which is neither clipped nor noised"):
        made_private({"t": torch.ones(3)}, {"sums": torch.ones(2)}, Privacy(clip=1, noise=1), ORDER, tmp_path)


@pytest.mark.parametrize("where", ["server", "client"])
def test_epsilon_grows_with_every_round(home: Path, where: str) -> None:
    recipe = private(where, "federation.rounds=3")
    assert epsilons(execute(recipe)) == [epsilon(recipe, count) for count in (1, 2, 3)]


def failing(message: Message, reply: Message) -> Message:
    raise ValueError("the battery is empty")


@pytest.mark.parametrize(("where", "counts"), [("server", (0, 1)), ("client", (1, 2))])
def test_a_failed_round_releases_nothing_of_the_servers_but_what_clients_have_sent(
    home: Path, where: str, counts: tuple[int, int]
) -> None:
    recipe = private(where, "federation.quorum=4")
    ended = execute(recipe, spoilt(failing, {3}, {1}))
    assert [record.status for record in ended.rounds] == ["completed", "failed", "completed"]
    assert epsilons(ended) == [epsilon(recipe, count) for count in counts]


class KilledError(Exception):
    """Stands for the end of a process before the second round is committed."""


def carried(recipe: Recipe) -> None:
    """Go on with run-1 in this home."""
    with Store.open() as store, claim("run-1"), silent():
        carry(LocalGrid(recipe.clients, InTurn(app)), store, "run-1")


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
        files.write(home / "other" / path, content)
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
    path.write_text(f"{TRIVIAL}privacy: {{clip: {CLIP}, noise: {NOISE}}}\n", encoding="utf-8")
    process = start(home, "simulate", str(path), "--json", plant="before the commit")
    process.join()
    assert process.exitcode == -signal.SIGKILL, (home / "printed").read_text()
    stopped = outcome()
    assert [record.number for record in stopped.rounds] == [0, 1]
    left = checkpoint.digest(checkpoint.load(homes.runs() / stopped.run.id / "round-0002.safetensors"))
    process = start(home, "simulate", "--resume", "latest", "--json")
    process.join()
    assert process.exitcode == 0, (home / "printed").read_text()
    ended = outcome()
    assert ended.hashes[2] == left
    recipe = private("server")
    assert epsilons(ended) == [epsilon(recipe, count) for count in (1, 2)]
