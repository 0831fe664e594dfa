"""Attacks by an enrolled device, by one that was, and by whoever shows another's public key."""

import datetime
import subprocess
from base64 import b64encode

import httpx
from flwr.app import RecordDict
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.error_pb2 import Error
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PushObjectRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedtune.cli.operator_client import connect_to_server
from fedtune.errors import ServerError
from fedtune.flower import train_messages
from fedtune.flower.fleet_client import make_signed_headers
from fedtune.server.operator_files import write_operator_file
from fedtune.tracking import Store
from tests.attacks.scene import Attack, Scene
from tests.federations import trivial
from tests.servers import FEDTUNE, Knocker

__all__ = ["ATTACKS"]

_PUSH, _OBJECT = "/v1/fleet/push-messages", "/v1/fleet/push-object"


def _unknown(scene: Scene) -> str:
    return scene.refused(Knocker(scene.server).signed("/v1/fleet/pull-messages"), 401)


def _stolen_key(scene: Scene) -> str:
    """The public key of an enrolled device, with a signature of another."""
    thief = Knocker(scene.server)
    now = datetime.datetime.now(datetime.UTC).timestamp()
    shown = make_signed_headers(scene.hostile.private, now)[FLEET_HTTP_PUBLIC_KEY_HEADER]
    headers = make_signed_headers(thief.private, now) | {FLEET_HTTP_PUBLIC_KEY_HEADER: shown}
    return scene.refused(scene.server.knock("POST", _PUSH, headers=headers), 401)


def _replayed(scene: Scene) -> str:
    """A signature that was good some minutes ago, and one under a new date."""
    now = datetime.datetime.now(datetime.UTC).timestamp()
    old = make_signed_headers(scene.hostile.private, now - TIMESTAMP_TOLERANCE - SYSTEM_TIME_TOLERANCE - 5)
    told = scene.refused(scene.server.knock("POST", "/fedtune/device/profile", headers=old, json={}), 401)
    fresh = old | {TIMESTAMP_HEADER: make_signed_headers(scene.hostile.private, now)[TIMESTAMP_HEADER]}
    scene.refused(scene.server.knock("POST", "/fedtune/device/profile", headers=fresh, json={}), 401)
    fresh[FLEET_HTTP_SIGNATURE_HEADER] = b64encode(b"no signature").decode()
    scene.refused(scene.server.knock("POST", "/fedtune/device/profile", headers=fresh, json={}), 401)
    return told


def _removed(scene: Scene) -> str:
    gone = Knocker(scene.server)
    gone.enroll(scene.server.token("gone"))
    with scene.server.operator() as connection:
        connection.request_json("DELETE", "devices/gone")
    return scene.refused(gone.signed("/v1/fleet/pull-messages"), 401)


def _token_twice(scene: Scene) -> str:
    token = scene.server.token()
    assert Knocker(scene.server).enroll(token, "first").status_code == 200
    return scene.refused(Knocker(scene.server).enroll(token, "second"), 403)


def _profile(scene: Scene) -> str:
    for profile in ({"examples": "[/x]"}, {"memory": 10**400}, {"memory": 1e300}, {"labels": {"a": -1}}):
        scene.refused(scene.hostile.signed("/fedtune/device/profile", content=_json(profile)), 400)
    named = {"labels": {"[/x]\u202e\x1b]0;owned\x07": 1}}
    assert scene.hostile.signed("/fedtune/device/profile", json=named).status_code == 200
    shown = subprocess.run([*FEDTUNE, "server", "devices"], capture_output=True, text=True, check=True).stdout
    assert all(character.isprintable() or character == "\n" for character in shown)
    return "400 the profile is not valid"


def _json(profile: object) -> bytes:
    return str(profile).replace("'", '"').encode()


def _operators_routes(scene: Scene) -> str:
    for path in ("runs", "tokens", "devices/honest/tags"):
        scene.refused(scene.hostile.signed(f"/fedtune/{path}", json={}), 401)
    return "401 needs an operator's key"


def _reader_submits(scene: Scene) -> str:
    """An operator who may look tries what they may not; a recipe that does not hold is posted past the command line."""
    with Store.open() as store:
        write_operator_file(scene.server.place, store.access, "reader", scene.folder / "reader.json", "read")
    told = []
    recipe = trivial("devices=[{name: any, count: 1, memory: 64MB}]").model_dump(mode="json")
    with connect_to_server(scene.folder / "reader.json") as reader:
        for method, path in (("POST", "runs"), ("POST", "tokens"), ("DELETE", "operators/local")):
            try:
                reader.request_json(method, path, {"recipe": recipe})
            except ServerError as error:
                told.append(str(error))
    assert len(told) == 3, told
    recipe["train"]["techniques"] = [{"name": "__import__", "settings": {}}]
    with scene.server.operator() as connection:
        try:
            connection.request_json("POST", "runs", {"recipe": recipe})
        except ServerError as error:
            told.append(str(error))
    assert len(told) == 4, "a recipe was taken that does not hold"
    return told[0]


def _announce(scene: Scene, content: RecordDict | None, reason: str = "") -> httpx.Response:
    message = Message(
        metadata=Metadata(run_id=1, src_node_id=scene.node, reply_to_message_id="a" * 64),
        error=Error(code=2, reason=reason) if reason else None,
    )
    tree = get_object_tree(content) if content is not None else ObjectTree(object_id="b" * 64)
    request = PushMessagesRequest(messages_list=[message], message_object_trees=[tree])
    return scene.hostile.signed(_PUSH, content=request.SerializeToString())


def _push(scene: Scene, name: str, content: bytes) -> httpx.Response:
    request = PushObjectRequest(run_id=1, object_id=name, object_content=content)
    return scene.hostile.signed(_OBJECT, content=request.SerializeToString())


def _bomb(scene: Scene) -> str:
    """5 MB on the wire that stand for 600."""
    content = train_messages.make_update_record(b"\0" * (120 * (5 << 20)), {"examples": 3})
    _announce(scene, content)
    objects = {name: one.deflate() for name, one in get_all_nested_objects(content).items()}
    told = ""
    for name, piece in objects.items():
        answer = _push(scene, name, piece)
        if answer.status_code == 413:
            told = scene.refused(answer, 413)
    assert told
    return told


def _reason(scene: Scene) -> str:
    """20 MB of reason for a round that was not trained."""
    try:
        return scene.refused(_announce(scene, None, "x" * 20_000_000), 413)
    except httpx.HTTPError:  # most of it is never read, so the answer may be lost
        return "413, cut off"


def _unannounced(scene: Scene) -> str:
    return scene.refused(_push(scene, "c" * 64, b"ArrayChunk  1\0x"), 409)


def _empty_held(scene: Scene) -> str:
    request = PushMessagesRequest(
        messages_list=[Message(metadata=Metadata(run_id=1))], message_object_trees=[ObjectTree(object_id="d" * 64)]
    )
    headers = {"fedtune-held": "", "content-type": "application/protobuf"}
    answer = scene.hostile.signed(_PUSH, content=request.SerializeToString(), headers=headers)
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    return f"{answer.status_code}"


ATTACKS = [
    Attack("a device that was never enrolled", _unknown, "this device is not enrolled here"),
    Attack("another device's public key", _stolen_key, "not signed with the device's key"),
    Attack("an old signature, replayed", _replayed, "by this server's clock"),
    Attack("a device that was removed", _removed, "this device is not enrolled here"),
    Attack("a token used twice", _token_twice, "this token has been used already"),
    Attack("a profile of markup and figures beyond all measure", _profile, "the profile is not valid"),
    Attack("a device's key where an operator's belongs", _operators_routes, "needs an operator's key"),
    Attack("a reader who submits, a recipe that does not hold", _reader_submits, "has the role read"),
    Attack("600 MB in 5 MB", _bomb, "too many for its round|the limit of the round is"),
    Attack("20 MB of reason", _reason, "push-messages: the request is larger"),
    Attack("objects of no answer", _unannounced, "belongs to no announced reply"),
    Attack("an empty fedtune-held header", _empty_held, ""),
]
