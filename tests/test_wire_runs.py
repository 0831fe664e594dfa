"""Coded messages in whole runs: their bytes, killed and resumed runs, lost messages and devices, and hostile ones."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Error, Message
from safetensors.torch import load_file
from torch import Tensor

from fedtune import checkpoint, paths
from fedtune.device.client_app import app
from fedtune.device.coded_update import encode_client_update
from fedtune.device.own_memory import FEEDBACK_PREFIX, MemoryFolder
from fedtune.errors import ClientUpdateError, RecipeError
from fedtune.recipe.schema import Recipe, Unit
from fedtune.server.server_app import run_to_completion
from fedtune.server.update_decoding import UpdateDecoder
from fedtune.simulation.in_process_grid import InProcessGrid
from fedtune.simulation.workers import SequentialWorkers
from fedtune.tracking import Store
from fedtune.tracking.rollback import rollback_run
from fedtune.training import clear_run_context
from fedtune.wire.client_update import TrainRequest
from fedtune.wire.codecs import WirePipeline, build_wire_pipeline
from fedtune.wire.recipe_codecs import MessagePlace
from fedtune.wire.state_message import decode_state, encode_state
from fedtune.wire.tensor_payload import iter_packed, pack, packed_size
from fedtune.wire.update_message import UpdateLayout, encode_update, receive_message
from tests.breaks import kill_and_resume
from tests.federations import Ended, execute, order_of, outcome, silent, spoilt, trivial, words

FEW = ("data.max_train_examples=80",)
EF = "error_feedback: ef21"
WEIGHT, BIAS = 7840, 10
"""The values of the logistic regression's two tensors."""


def coded(wire: str, *overrides: str) -> Recipe:
    return trivial(f"wire={{{wire}}}", *FEW, *overrides)


def build(*names: Any) -> WirePipeline:
    return build_wire_pipeline([Unit.model_validate(name) for name in names], "wire.up")


def read_server_estimates(run: str, client: int, number: int) -> dict[str, Tensor]:
    return load_file(
        paths.get_runs_folder() / run / "feedback" / f"client-{client:06d}" / f"round-{number:04d}.safetensors"
    )


def read_device_estimates(run: str, client: int) -> dict[int, dict[str, Tensor]]:
    folder = paths.get_runs_folder() / run / "own" / f"client-{client:06d}"
    return MemoryFolder(folder, run, prefix=FEEDBACK_PREFIX).read_earlier(1000)


def hash_feedback(run: str) -> dict[str, str]:
    """The digest of every estimate on the server and on the devices, by file."""
    folder = paths.get_runs_folder() / run
    files = [*folder.glob("feedback/*/*"), *folder.glob("own/*/feedback-*")]
    return {str(path.relative_to(folder)): checkpoint.hash_tensors(load_file(path)) for path in sorted(files)}


@pytest.mark.parametrize(
    "wire",
    [
        f"up: [top-k, int8, zstd], down: [int8, zstd], {EF}",
        f"up: [{{low-rank: {{rank: 2}}}}, {{random-k: {{share: 0.2}}}}, int4], {EF}",
        "up: [{random-k: {unbiased: true}}, sign], down: [bf16]",
    ],
)
def test_a_killed_run_ends_with_the_bits_of_one_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, wire: str
) -> None:
    recipe = coded(wire, "federation.rounds=3")
    alone, killed = execute(recipe, run="alone"), kill_and_resume(recipe, monkeypatch)
    assert alone.run.status == killed.run.status == "completed"
    assert killed.hashes == alone.hashes
    assert len(set(alone.hashes)) == 4, "each round moves the model"
    assert hash_feedback("killed") == hash_feedback("alone")
    assert len(hash_feedback("alone")) == (4 * 4 if EF in wire else 0), "two rounds of four clients on both ends"


@pytest.mark.parametrize(
    ("up", "values"),
    [
        ("[bf16]", 2 * (WEIGHT + BIAS)),
        ("[int8]", WEIGHT + 4 * 31 + BIAS + 4),
        ("[sign]", WEIGHT // 8 + 4 * 8 + 2 + 4),
        ("[{top-k: {k: 10}}]", 4 * 10 + (10 * 9 + 7) // 8 + (10 + 15 + 7) // 8 + 4 * 10 + 3),
        ("[{random-k: {share: 0.1}}, int4]", 784 // 2 + 4 * 13 + 1 + 4),
        ("[{low-rank: {rank: 2}}, bf16]", 2 * 2 * (10 + 784) + 2 * BIAS),
    ],
)
def test_bytes_are_counted_as_the_closed_form_tells(home: Path, up: str, values: int) -> None:
    """Before them are eight bytes of a mark, eight of a length, and one entry of a header filled up with spaces."""
    ended = execute(coded(f"up: {up}", "federation.rounds=1"))
    header = len(f'{{"wire:up":{{"dtype":"U8","shape":[{values + 8}],"data_offsets":[0,{values + 8}]}}}}')
    expected = 8 + header + -header % 8 + 8 + values
    assert [one.bytes_up for one in ended.rounds[1].client_records] == [expected] * 4
    assert [one.bytes_down for one in ended.rounds[1].client_records] == [31560] * 4


def test_zstd_alone_changes_no_bit_of_the_result(home: Path) -> None:
    plain = execute(trivial(*FEW), run="plain")
    small = execute(coded("up: [zstd], down: [zstd]"), run="small")
    assert small.hashes == plain.hashes
    first, second = (one.rounds[1].client_records[0] for one in (plain, small))
    assert second.bytes_up < first.bytes_up
    assert second.bytes_down < first.bytes_down


def list_statuses(ended: Ended, number: int) -> list[str]:
    return [one.status for one in ended.rounds[number].client_records]


def lose(message: Message, reply: Message) -> Message:
    return Message(Error(0, "lost"), reply_to=message)


def test_both_ends_hold_the_same_estimates_when_messages_get_lost(home: Path) -> None:
    recipe = coded(f"up: [top-k, int8], {EF}", "federation.rounds=4")
    ended = execute(recipe, spoilt(lose, [1, 2], rounds=[1, 3]))
    assert list_statuses(ended, 3) == ["merged", "error", "error", "merged"]
    for client in range(4):
        own = read_device_estimates("run-1", client)
        assert list(own) == [4]
        server = read_server_estimates("run-1", client, 4)
        assert own[4].keys() == server.keys()
        assert all(torch.equal(own[4][name], server[name]) for name in server)
        assert all(float(one.abs().max()) > 0 for one in server.values())


def test_a_device_that_was_away_finds_its_own_estimate(home: Path) -> None:
    """Client 0 answers in rounds 1 and 5. Its estimate of round 5 is that of round 1 and what it sent, bit for bit."""
    sent: dict[int, bytes] = {}

    def keep(message: Message, reply: Message) -> Message:
        number, _ = order_of(message)
        sent[number] = reply.content.array_records["delta"]["safetensors"].data
        return lose(message, reply) if 1 < number < 5 else reply

    recipe = coded(f"up: [top-k, bf16], {EF}", "federation.rounds=5")
    ended = execute(recipe, spoilt(keep, [0]))
    assert [list_statuses(ended, number)[0] for number in range(1, 6)] == ["merged", *["error"] * 3, "merged"]
    layout = UpdateLayout(build("top-k", "bf16"), {"classifier.bias": (10,), "classifier.weight": (10, 784)}, {})
    first = read_server_estimates("run-1", 0, 1)
    assert set(first) == set(layout.shapes)
    received = receive_message(layout, sent[5], MessagePlace(recipe.seed, 5, 0, feedback_round=1), first)
    last, own = read_server_estimates("run-1", 0, 5), read_device_estimates("run-1", 0)[5]
    for name in layout.shapes:
        assert torch.equal(received.decode_delta(name), last[name])
        assert torch.equal(own[name], last[name])


def test_a_device_that_lost_its_estimate_begins_anew(home: Path) -> None:
    """Its message says so, and the server takes it without what it had kept."""

    def forget(message: Message, reply: Message) -> Message:
        for path in (paths.get_runs_folder() / "run-1" / "own" / "client-000002").glob("feedback-*"):
            path.unlink()
        return reply

    recipe = coded(f"up: [{{top-k: {{k: 3}}}}], {EF}", "federation.rounds=3")
    ended = execute(recipe, spoilt(forget, [2], rounds=[2]))
    assert list_statuses(ended, 3) == ["merged"] * 4
    kept = [int((read_server_estimates("run-1", client, 3)["classifier.weight"] != 0).sum()) for client in range(4)]
    assert kept[2] == 3
    assert min(kept[:2]) > 3
    own = read_device_estimates("run-1", 2)[3]
    assert all(torch.equal(own[name], one) for name, one in read_server_estimates("run-1", 2, 3).items())


@pytest.mark.parametrize("number", [1, 2])
def test_after_a_rollback_both_ends_go_on_from_the_same_estimates(home: Path, number: int) -> None:
    """Both keep two rounds: from round 2 the run has its bits again, from round 1 estimates begin anew."""
    whole = execute(coded(f"up: [top-k, int8], {EF}", "federation.rounds=3", "checkpoints.keep=all"))
    with Store.open() as store:
        rollback_run(store, "run-1", number)
        store.reopen("run-1")
        with silent():
            run_to_completion(InProcessGrid(4, SequentialWorkers(app)), store, "run-1")
    again = outcome("run-1")
    assert again.run.status == "completed"
    assert (again.hashes == whole.hashes) == (number == 2)
    for client in range(4):
        own, server = read_device_estimates("run-1", client)[3], read_server_estimates("run-1", client, 3)
        assert all(torch.equal(own[name], server[name]) for name in server)


def test_estimates_of_a_tensor_rest_while_others_train(home: Path, tmp_path: Path) -> None:
    """As with factors that alternate: a trains in rounds 1 and 3, b in round 2. The third message goes on from the
    estimate of the first.
    """
    recipe, codecs = coded(f"up: [{{top-k: {{k: 2}}}}], {EF}"), build({"top-k": {"k": 2}})
    values = {number: torch.randn(6, generator=torch.Generator().manual_seed(number)) for number in (1, 2, 3)}
    for number, name in enumerate("aba", 1):
        request = TrainRequest("", number, 0, "run", feedback_round=number - 1)
        message = encode_client_update({name: values[number]}, {}, recipe, request, tmp_path)
        place = MessagePlace(recipe.seed, number, 0, number - 1)
        decoder = UpdateDecoder("run", UpdateLayout(codecs, {name: (6,)}, {}), place, feeds_back=True)
        path = tmp_path / "update"
        decoder.keep_estimates(path, decoder.write_update(message, path))
    own = MemoryFolder(tmp_path, "run", prefix=FEEDBACK_PREFIX).read_earlier(9)[3]
    server = read_server_estimates("run", 0, 3)
    assert own.keys() == server.keys() == {"a", "b"}
    assert all(torch.equal(own[name], server[name]) for name in own)
    assert int(torch.isclose(server["a"], values[3]).sum()) >= 2
    assert int((server["a"] != 0).sum()) > 2


def change_payload(change: Callable[[bytes, Message], bytes]) -> Callable[[Message, Message], Message]:
    def spoil(message: Message, reply: Message) -> Message:
        array = reply.content.array_records["delta"]["safetensors"]
        array.data = change(array.data, message)
        reply.content["delta"] = ArrayRecord({"safetensors": array})
        return reply

    return spoil


def send_as_round_one(payload: bytes, message: Message) -> bytes:
    number, client = order_of(message)
    shapes = {"classifier.bias": (10,), "classifier.weight": (10, 784)}
    mark = MessagePlace(0, number, client, 1).make_mark(build("top-k", "int8"), shapes)
    assert mark in payload
    return payload.replace(mark, MessagePlace(0, 1, client, 1).make_mark(build("top-k", "int8"), shapes))


def send_nan(payload: bytes, message: Message) -> bytes:
    """The scale of the bias is behind the mark and one position in a byte each of low and high bits."""
    start = payload.index(b"}}") + 2
    start += -start % 8 + 8
    return payload[: start + 2] + np.float32("nan").tobytes() + payload[start + 6 :]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda payload, _: payload + b"\0", "bytes, and this round expects"),
        (lambda payload, _: payload[:-1], "bytes instead of"),
        (lambda payload, _: b"", "has 0 bytes instead of"),
        (
            lambda payload, _: pack({"classifier.weight": torch.zeros(10, 784), "classifier.bias": torch.zeros(10)}),
            "this round expects",
        ),
        (lambda payload, _: payload.replace(b"wire:up", b"wire:no"), "it lacks wire:up of"),
        (lambda payload, _: payload.replace(b'"U8"', b'"I8"'), "it lacks wire:up of"),
        (send_as_round_one, "of another round, client, recipe or model"),
        (lambda payload, _: payload[:-600] + b"\xff" * 600, "classifier.weight: .*"),
        (send_nan, "classifier.bias holds values that are not finite"),
    ],
)
def test_a_hostile_message_is_rejected_and_leaves_no_trace(
    home: Path, change: Callable[[bytes, Message], bytes], reason: str
) -> None:
    recipe = coded("up: [top-k, int8], " + EF)
    ended = execute(recipe, spoilt(change_payload(change), [3], rounds=[2]))
    rejected = ended.rounds[2].client_records[3]
    assert rejected.status == "rejected"
    assert re.search(reason, rejected.reason), rejected.reason
    assert not list((paths.get_runs_folder() / "run-1" / "feedback" / "client-000003").glob("round-0002*"))
    assert list_statuses(ended, 2)[:3] == ["merged"] * 3


def test_a_bomb_is_no_larger_than_the_round_expects(home: Path) -> None:
    bomb = build("zstd").compress(bytes(1 << 26))
    recipe = coded("up: [top-k, int8, zstd]")
    ended = execute(recipe, spoilt(change_payload(lambda payload, _: bomb[: len(payload)]), [3], rounds=[2]))
    assert "cannot be decompressed" in ended.rounds[2].client_records[3].reason


def test_error_feedback_follows_the_twin_and_reaches_the_optimum() -> None:
    """Three clients with quadratics f_i = |A_i (x - c_i)|^2 / 2 send top-1 of their gradients, 5 entries each.

    EF21 in NumPy (Algorithm 2): g_i += C(grad_i - g_i), x -= step * mean g_i. Without it the same run stalls.
    """
    random = np.random.default_rng(0)
    scales, centres = random.uniform(0.5, 2, (3, 5)).astype(np.float32), random.normal(0, 3, (3, 5)).astype(np.float32)
    optimum = (scales**2 * centres).sum(0) / (scales**2).sum(0)
    twin, estimates = np.zeros(5, np.float32), np.zeros((3, 5), np.float32)
    found, alone = torch.zeros(5), torch.zeros(5)
    own: list[dict[str, Tensor]] = [{} for _ in range(3)]
    server: list[dict[str, Tensor]] = [{} for _ in range(3)]
    for number in range(1, 251):
        for client in range(3):
            short = scales[client] ** 2 * (twin - centres[client]) - estimates[client]
            largest = np.abs(short).argmax()
            estimates[client, largest] += short[largest]
        twin = twin - np.float32(0.1) * (estimates[0] + estimates[1] + estimates[2]) / np.float32(3)
        step, plain = torch.zeros(5), torch.zeros(5)
        for client in range(3):
            curve, centre = torch.from_numpy(scales[client] ** 2), torch.from_numpy(centres[client])
            place = MessagePlace(0, number, client, number - 1)
            server[client], own[client] = send_by_feedback(curve * (found - centre), place, server[client], own[client])
            step += server[client]["x"]
            message, _ = encode_update(TOP_ONE, {"x": curve * (alone - centre)}, {}, place)
            plain += receive_message(UpdateLayout(TOP_ONE, {"x": (5,)}, {}), message, place, {}).decode_delta("x")
        found, alone = found - 0.1 * step / 3, alone - 0.1 * plain / 3
    np.testing.assert_allclose(found.numpy(), twin, rtol=0, atol=2e-6)
    assert np.abs(found.numpy() - optimum).max() < 1e-5
    assert np.abs(alone.numpy() - optimum).max() > 100 * np.abs(found.numpy() - optimum).max()


TOP_ONE = build({"top-k": {"k": 1}})


def send_by_feedback(
    update: Tensor, place: MessagePlace, server: dict[str, Tensor], own: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The estimates of server and device after a message, which are equal to the bit."""
    message, following = encode_update(TOP_ONE, {"x": update}, {}, place, own)
    layout = UpdateLayout(TOP_ONE, {"x": tuple(update.shape)}, {})
    received = {"x": receive_message(layout, message, place, server).decode_delta("x")}
    assert torch.equal(received["x"], following["x"])
    return received, following


def test_a_state_comes_back_as_it_may_and_exact_where_it_must() -> None:
    state = {
        "layer.weight": torch.randn(40, 30, generator=torch.Generator().manual_seed(0)),
        "norm.running_var": torch.rand(7, generator=torch.Generator().manual_seed(1)),
        "memory:sums": torch.rand(9, generator=torch.Generator().manual_seed(2)),
        "steps": torch.tensor([3]),
        "empty": torch.zeros(0, 4),
    }
    shapes = {name: tuple(one.shape) for name, one in state.items() if not name.startswith("memory:")}
    for units in (["int8"], ["bf16", "zstd"], ["zstd"]):
        found = decode_state(build(*units), encode_state(build(*units), state), shapes)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state if name != "layer.weight")
        lost = (found["layer.weight"] - state["layer.weight"]).abs()
        bound = float(state["layer.weight"].abs().max()) * {"int8": 1 / 254, "bf16": 2**-8, "zstd": 0}[units[0]]
        assert float(lost.max()) <= bound
        assert (units == ["zstd"]) == torch.equal(found["layer.weight"], state["layer.weight"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: (1 << 50).to_bytes(8, "little") + content[8:], "would expand to"),
        (lambda content: content[:-1], "does not expand"),
        (lambda content: b"", "does not expand"),
        (lambda content: content[:8] + build("zstd").compress(bytes(1 << 24)), "cannot be decompressed"),
    ],
)
def test_a_damaged_state_is_refused(change: Callable[[bytes], bytes], reason: str) -> None:
    codecs = build("int8", "zstd")
    content = encode_state(codecs, {"weight": torch.ones(40, 30)})
    with pytest.raises(ClientUpdateError, match=reason):
        decode_state(codecs, change(content), {"weight": (40, 30)})


def test_a_state_of_another_model_is_refused() -> None:
    codecs = build("int8")
    content = encode_state(codecs, {"weight": torch.ones(40, 30)})
    for shapes in ({"other": (40, 30)}, {"weight": (40, 31)}):
        with pytest.raises(ClientUpdateError):
            decode_state(codecs, content, shapes)


def test_pieces_of_a_payload_are_the_payload() -> None:
    tensors = {"b": torch.rand(3, 4), "a": torch.arange(5), "c": torch.zeros(0), "d": torch.ones(7, dtype=torch.uint8)}
    bare = {name: one.to("meta") if name == "b" else one for name, one in tensors.items()}
    assert b"".join(iter_packed(bare, tensors.__getitem__)) == pack(tensors)
    assert packed_size(bare) == len(pack(tensors))


def test_a_recipe_without_codecs_is_written_as_before() -> None:
    assert "wire" not in trivial().model_dump(mode="json")
    written = coded("up: top-k+zstd").model_dump(mode="json")["wire"]
    assert written == {
        "up": [{"top-k": {"share": 0.05, "k": None}}, {"zstd": {"level": 10}}],
        "down": [],
        "error_feedback": "none",
    }


@pytest.mark.parametrize(
    ("wire", "overrides"),
    [
        (
            "up: [{random-k: {share: 0.3}}, int8, zstd], down: [int8, zstd]",
            ("federation.asynchronous={buffer_size: 2}",),
        ),
        ("up: [top-k, int8, zstd]", ("train.techniques=dynamic-pruning",)),
        (f"up: [sign], {EF}", ("federation.clients_per_round=2", "merge=[median, fedavgm]")),
        (f"up: [top-k, int8, zstd], down: [bf16], {EF}", ("federation.algorithm=scaffold", "train.max_grad_norm=null")),
        ("up: [zstd], down: [int8]", ("privacy={clipping_norm: 1, noise_multiplier: 1}",)),
    ],
)
def test_codecs_go_with_other_settings(home: Path, wire: str, overrides: tuple[str, ...]) -> None:
    ended = execute(coded(wire, *overrides))
    assert ended.run.status == "completed"
    assert {one.status for one in ended.rounds[2].client_records} == {"merged"}
    assert len(set(ended.hashes)) == 3


PRIVACY = "privacy={clipping_norm: 1, noise_multiplier: 1}"


@pytest.mark.parametrize(
    ("wire", "overrides", "reason"),
    [
        ("up: []", (), "up and down name no codec"),
        ("up: [int8, top-k]", (), "wire.up: top-k cannot follow int8"),
        ("down: [int9]", (), "wire.down: there is no 'int9'"),
        ("up: [int8], feedback: ef21", (), "feedback"),
        ("up: [{top-k: {k: 0}}]", (), "wire.up, top-k: k"),
        (f"up: [top-k], {EF}", (PRIVACY,), "privacy noised or clipped away before, beyond the accounting; drop one"),
        ("up: [int8]", (PRIVACY,), "int8 changes updates after privacy has clipped and noised them; name zstd alone"),
        (f"up: [zstd], {EF}", (), "wire.up names no codec that loses anything"),
        (f"down: [int8], {EF}", (), "wire.up names no codec that loses anything"),
        (f"up: [{{random-k: {{unbiased: true}}}}], {EF}", (), "random-k enlarges what it sends"),
        (f"up: [top-k], {EF}", ("federation.asynchronous={buffer_size: 2}",), "merges late updates; drop one"),
        (f"up: [top-k], {EF}", ("train.techniques=compact",), "compact, which trains another random subspace"),
        ("up: [top-k]", ("federation.algorithm=feddyn", "train.max_grad_norm=null"), "updates that feddyn adds up"),
        ("down: [top-k]", (), "top-k is for changes of weights, not for weights; name bf16, int8 or int4"),
        ("down: [{low-rank: {rank: 2}}]", (), "low-rank is for changes of weights"),
        ("down: [int8]", ("train.techniques=dynamic-pruning",), "dynamic-pruning sends the active weights"),
    ],
)
def test_what_codecs_do_not_hold_with_is_refused(wire: str, overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        coded(wire, *overrides)


LORA = "train.techniques=[{lora: {trained_factors: %s}}]"


@pytest.mark.parametrize(
    ("wire", "overrides", "reason"),
    [
        (f"up: [top-k], {EF}", (LORA % "both", "merge=[flexlora]"), "the factors that flexlora makes anew each round"),
        ("down: [int8]", (LORA % "both-and-base", "merge=[fedex-lora]"), "fedex-lora writes into base weights"),
        ("up: [int8]", ("train.techniques=[full, fedkseed]", "train.optimiser=sgd"), "fedkseed sends scalars of seeds"),
        ("down: [int8]", ("train.techniques=[full, fedkseed]", "train.optimiser=sgd"), "rebuilds all weights from the"),
    ],
)
def test_what_codecs_of_adapters_do_not_hold_with_is_refused(
    tmp_path: Path, wire: str, overrides: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(RecipeError, match=reason):
        words(tmp_path, f"wire={{{wire}}}", *overrides)


@pytest.mark.parametrize(
    ("up", "reason"),
    [
        ("{top-k: {k: 11}}", "wire.up, top-k: it takes 11 entries, but .*bias has 10; lower k, or set a share"),
        ("{random-k: {k: 7841}}", "wire.up, random-k: it takes 7841 entries, but"),
        ("{low-rank: {rank: 10}}", "wire.up, low-rank: it makes no tensor of this recipe smaller; lower its rank"),
    ],
)
def test_more_than_the_model_has_is_refused_before_training(home: Path, up: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        execute(coded(f"up: [{up}]"))
    clear_run_context()
