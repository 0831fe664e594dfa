"""Attacks by a device that takes part in a round, against which the server's defences know what the round asks for."""

import time
from contextlib import suppress

import httpx
import torch
from flwr.app.message.message import make_message, remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedtune.errors import ServerError
from fedtune.flower import train_messages
from fedtune.flower.fleet_client import FleetClient, make_reply_metadata
from fedtune.wire.client_update import ClientReport, decode_tensors, pack
from tests.attacks.scene import Attack, Scene
from tests.federations import trivial
from tests.servers import Knocker, ended

__all__ = ["ATTACKS", "PATIENCE", "claimed", "make_fleet", "stopped"]

PATIENCE = 240.0
_LARGE = 6_000_000
_RECIPE = ("devices=[{name: any, count: 1, memory: 64MB}]", "federation.selection={devices: [hostile]}")


def _order(scene: Scene) -> PullMessagesResponse:
    """A run for the hostile device alone, and its first order."""
    recipe = trivial(*_RECIPE).model_dump(mode="json")
    with scene.server.operator() as connection, scene.hostile.fleet() as fleet:
        node = Node(node_id=scene.node)
        fleet.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=60))
        run = connection.request_json("POST", "runs", {"recipe": recipe})["run"]
        scene.left_open.append(lambda: stopped(scene, run))
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            fleet.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=60))
            told = fleet.PullMessages(PullMessagesRequest(node=node))
            if told.messages_list:
                return told
            time.sleep(0.5)
    raise AssertionError(f"no order of run {run} came in {PATIENCE:.0f} s")


def stopped(scene: Scene, run: str) -> None:
    """Stop a run, if it has not ended."""
    with scene.server.operator() as connection, suppress(ServerError):  # it may have ended by itself
        connection.request_json("POST", f"runs/{run}/stop")


def _large_answer(scene: Scene) -> str:
    """6 MB for an order that asks for some kilobytes."""
    [asked] = [message_from_proto(one) for one in _order(scene).messages_list]
    reply = make_message(
        make_reply_metadata(asked.metadata),
        train_messages.make_update_record(bytes(range(250)) * (_LARGE // 250), {}),
        None,
    )
    reply.metadata.__dict__["_message_id"] = reply.object_id
    announced = PushMessagesRequest(
        node=Node(node_id=scene.node),
        messages_list=[message_to_proto(remove_content_from_message(reply))],
        message_object_trees=[get_object_tree(reply)],
    )
    with scene.hostile.fleet() as fleet:
        session = fleet.PushMessages(announced).session_id
        for name, one in get_all_nested_objects(reply).items():
            request = PushObjectRequest(
                node=Node(node_id=scene.node),
                run_id=asked.metadata.run_id,
                session_id=session,
                object_id=name,
                object_content=one.deflate(),
            )
            try:
                fleet.PushObject(request)
            except httpx.HTTPStatusError as error:
                return scene.refused(error.response, 413)
    raise AssertionError("it was taken whole")


def _destructive(scene: Scene) -> str:
    """In its first round it claims 10**18 examples, in its second it sends deltas that are not finite."""
    fleet = make_fleet(scene, scene.hostile, scene.node)
    recipe = trivial(*_RECIPE).model_dump(mode="json")
    fleet.send_heartbeat()
    with scene.server.operator() as connection:
        run = connection.request_json("POST", "runs", {"recipe": recipe})["run"]
    scene.left_open.append(lambda: stopped(scene, run))
    for examples, value in ((10**18, 0.0), (3, float("inf"))):
        claim = claimed(fleet)
        task = fleet.download_message(claim)
        deltas = {name: torch.full_like(tensor, value) for name, tensor in decode_tensors(task.payload).items()}
        report = ClientReport(examples, loss=1.0, seconds=1.0, activation_memory=1, peak_memory=1)
        fleet.push_update(claim, pack(deltas), report.to_fields(), 1.0)
    found = ended(scene.server, run, PATIENCE)
    fleet.close()
    told = [sent for record in found["rounds"] for sent in record["client_records"]]
    assert [sent["status"] for sent in told] == ["rejected", "rejected"], told
    assert len({record["checkpoint"]["sha256"] for record in found["rounds"] if record["checkpoint"]}) == 1
    return "; ".join(sent["reason"] for sent in told)


def make_fleet(scene: Scene, knocker: Knocker, node: int) -> FleetClient:
    """A device's own client, with which it may send what it likes."""
    address = scene.server.url.removeprefix("https://")
    return FleetClient(address, scene.server.place.ca_file.read_text(), knocker.private, node, time.time)


def claimed(fleet: FleetClient) -> bytes:
    """The next order."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        fleet.send_heartbeat()
        if claim := fleet.pull_message():
            fleet.mark_message_stored(claim)
            return claim
        time.sleep(0.5)
    raise AssertionError(f"no order came in {PATIENCE:.0f} s")


ATTACKS = [
    Attack("10**18 examples claimed, and deltas that are not finite", _destructive, ""),
    Attack(
        "an answer a hundred times as large as its round asks for", _large_answer, r"the limit of the round is \d{6}"
    ),
]
