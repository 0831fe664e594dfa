"""Privacy on the path of a round: what is sent, what is believed, what comes of it; killed runs repeat it."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from numpy.typing import NDArray
from torch import Tensor

from fedtune.device.device_home import DeviceHome
from fedtune.device.local_data import summarise_local_data
from fedtune.device.local_round import read_payload, run_local_round
from fedtune.device.private_update import make_update_private as made_private
from fedtune.device.trainer_channel import Frame
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.errors import ClientUpdateError
from fedtune.privacy import ROUNDING_SLACK
from fedtune.recipe.schema import PrivacySettings
from fedtune.server.privacy_accounting import compute_epsilon
from fedtune.training import get_model_state, get_run_context
from fedtune.wire.client_update import TrainRequest, decode_tensors, pack
from fedtune.wire.masked_weights import encode_masked_state
from tests.federations import execute, order_of, spoilt
from tests.private_federations import CLIP, NOISE, Sent, epsilons, keeping, key_of, private, state

ORDER = TrainRequest("", 1, 0, "run-1")


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
    for one in left:
        assert abs(one.mean()) < 5 / math.sqrt(count)
        assert abs(one.var() - 1) < 5 * math.sqrt(2 / count)
    assert correlation(left) < 5 / math.sqrt(count), "each round has noise of its own"


def correlation(rows: Sequence[NDArray[np.float64]]) -> float:
    """The largest between two rows."""
    return float(np.abs(np.asarray(np.corrcoef(np.stack(rows))) - np.eye(len(rows))).max())


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
    """Client 0 says that it trained on a twentieth of the examples it did; more than it can have is refused."""
    reply.content.metric_records["report"]["num_examples"] = 1
    return reply


def test_a_client_that_counts_fewer_examples_weighs_no_less(home: Path) -> None:
    sent: Sent = {}
    keep = keeping(sent)
    app = spoilt(
        lambda message, reply: keep(message, counting(message, reply) if not order_of(message)[1] else reply), range(4)
    )
    ended = execute(private("server", "privacy.noise_multiplier=1e-6", "federation.rounds=1"), app)
    mean = sum(flat(sent[1, client]) for client in range(4)) / 4
    gone = flat(state(ended, 1)) - flat(state(ended, 0))
    torch.testing.assert_close(gone, mean, rtol=0, atol=1e-7)
    assert [one.num_examples for one in ended.rounds[1].client_records] == [1, 20, 20, 20]


@pytest.mark.parametrize(("factor", "status"), [(1 + ROUNDING_SLACK / 2, "merged"), (1.01, "rejected")])
def test_a_norm_above_the_bound_is_refused(home: Path, factor: float, status: str) -> None:
    def enlarge(message: Message, reply: Message) -> Message:
        array = reply.content.array_records["delta"]["safetensors"]
        deltas = decode_tensors(array.data)
        norm = float(flat(deltas).norm())
        array.data = pack({name: (tensor.double() * (factor * CLIP / norm)).float() for name, tensor in deltas.items()})
        return reply

    ended = execute(private("server"), spoilt(enlarge, {1}))
    bad = ended.rounds[1].client_records[1]
    assert bad.status == status
    assert (f"above privacy.clipping_norm {CLIP}" in bad.reason) == (status == "rejected")


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
    assert correlation(own) < 5 / math.sqrt(count)
    mean = sum(flat(sent[1, client]) for client in range(4)) / 4
    torch.testing.assert_close(flat(state(ended, 1)) - flat(state(ended, 0)), mean, rtol=0, atol=1e-6)
    assert not key_of("run-1").exists()


def test_a_client_with_its_own_noise_tells_neither_examples_nor_loss_nor_labels(home: Path) -> None:
    recipe = private("client")
    ended = execute(recipe)
    told = [one for record in ended.rounds[1:] for one in record.client_records]
    assert all(one.num_examples == 1 and math.isnan(one.train_loss) for one in told)
    shop = get_run_context(recipe.model_dump_json())
    assert summarise_local_data(shop, shop.client_rows[0]) == {}
    other = get_run_context(private("server").model_dump_json())
    assert summarise_local_data(other, other.client_rows[0])["examples"] == len(other.client_rows[0])


@pytest.mark.slow
def test_a_device_sends_what_a_simulation_would_with_its_secret_and_says_nothing_else(home: Path) -> None:
    recipe = private("client").model_dump_json()
    shop = get_run_context(recipe)
    payload = pack(encode_masked_state(get_model_state(shop.model, shop.shared_names)))
    order = TrainRequest(recipe, 1, 1, "one")
    keeper = TrainerSupervisor("partition:1", 4_000_000_000, 60.0)
    try:
        answer = keeper.run_request(Frame(asdict(order), payload))
    finally:
        keeper.stop_trainer()
    assert answer.header["kind"] == "trained", answer.header
    assert (answer.header["holding"], answer.header["report"]["num_examples"]) == ({}, 1)
    simulated = [
        run_local_round(order, read_payload(payload, shop, order.client), shop, shop.client_rows[1], at)[0]
        for at in (DeviceHome().get_local_state_folder("one"), home / "new")
    ]
    assert answer.payload == simulated[0] != simulated[1]


def test_the_same_noise_is_never_added_to_two_different_contributions(tmp_path: Path) -> None:
    """Whoever had both could subtract them, and see the difference in clear."""
    own = PrivacySettings(clipping_norm=10.0, noise_multiplier=1.0, noise_added_by="clients")
    one, other = {"t": torch.zeros(50_000)}, {"t": torch.zeros(50_000)}
    other["t"][0] = 1e-3
    noises = [made_private(deltas, {}, own, ORDER, tmp_path)["t"] - deltas["t"] for deltas in (one, other)]
    assert correlation([noise.numpy() for noise in noises]) < 5 / math.sqrt(50_000)
    again = made_private(one, {}, own, ORDER, tmp_path)["t"]
    assert torch.equal(again, noises[0])
    later = made_private(one, {}, own, replace(ORDER, round=2), tmp_path)["t"]
    assert correlation([again.numpy(), later.numpy()]) < 5 / math.sqrt(50_000)


def test_a_client_sends_nothing_that_is_neither_clipped_nor_noised(tmp_path: Path) -> None:
    with pytest.raises(ClientUpdateError, match="it would send sums, which is neither clipped nor noised"):
        made_private(
            {"t": torch.ones(3)},
            {"sums": torch.ones(2)},
            PrivacySettings(clipping_norm=1, noise_multiplier=1),
            ORDER,
            tmp_path,
        )


@pytest.mark.parametrize("where", ["server", "client"])
def test_epsilon_grows_with_every_round(home: Path, where: str) -> None:
    recipe = private(where, "federation.rounds=3")
    assert epsilons(execute(recipe)) == [compute_epsilon(recipe, count) for count in (1, 2, 3)]


def failing(message: Message, reply: Message) -> Message:
    raise ValueError("the battery is empty")


@pytest.mark.parametrize(("where", "counts"), [("server", (0, 1)), ("client", (1, 2))])
def test_a_failed_round_releases_nothing_of_the_servers_but_what_clients_have_sent(
    home: Path, where: str, counts: tuple[int, int]
) -> None:
    recipe = private(where, "federation.quorum=4")
    ended = execute(recipe, spoilt(failing, {3}, {1}))
    assert [record.status for record in ended.rounds] == ["completed", "failed", "completed"]
    assert epsilons(ended) == [compute_epsilon(recipe, count) for count in counts]


def test_a_client_that_is_chosen_more_often_is_charged_more(home: Path) -> None:
    few = ["federation.clients_per_round=2", "federation.quorum=2", "federation.rounds=3"]
    recipe = private("server", *few, "federation.selection.sampling=longest-ago")
    assert epsilons(execute(recipe)) == [compute_epsilon(recipe, count) for count in (1, 1, 2)]
