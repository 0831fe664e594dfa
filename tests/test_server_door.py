"""A real server is knocked at: who is let in, who is refused, and that every refusal is told."""

import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress

import httpx
import psutil
import pytest
from click.testing import CliRunner
from flwr.proto.control_pb2 import ListNodesRequest, StartRunRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.control import ControlHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedtune.cli.operator_client import OperatorClient
from fedtune.cli.server_devices import devices, tag
from fedtune.errors import ServerError, StoreError
from fedtune.flower.control_client import ControlClient
from fedtune.server import certificate_authority
from fedtune.server.server_home import open_server_home
from fedtune.server.server_process import run_server
from fedtune.wire.error_codes import STORED_MESSAGE_HEADER
from tests.servers import Knocker, Server, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("door")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FEDTUNE_HOME", str(home))
        patched.delenv("FEDTUNE_STORE", raising=False)
        patched.delenv("FEDTUNE_OPERATOR_FILE", raising=False)
        with serving(home) as served:
            yield served


@pytest.fixture(scope="module")
def enrolled(server: Server) -> Knocker:
    knocker = Knocker(server)
    assert knocker.enroll(server.token("one"), "ignored").json()["name"] == "one"
    return knocker


def error(answer: httpx.Response) -> str:
    sentence: str = answer.json()["error"]
    return sentence


def test_the_authority_that_a_token_names_is_the_one_the_server_shows(server: Server) -> None:
    shown = server.knock("GET", "/fedtune/ca").text
    assert shown == server.place.ca_file.read_text()
    assert len(certificate_authority.compute_certificate_fingerprint(shown)) == 64


def test_an_enrolled_device_is_activated_and_seen_as_connected(server: Server, enrolled: Knocker) -> None:
    with enrolled.fleet() as fleet:
        node = fleet.ActivateNode(ActivateNodeRequest(public_key=enrolled.pem, heartbeat_interval=30)).node_id
        assert list(fleet.PullMessages(PullMessagesRequest(node=Node(node_id=node))).messages_list) == []
    with server.operator() as connection:
        [device] = [one for one in connection.request_json("GET", "devices")["devices"] if one["name"] == "one"]
    assert device["online"]


def test_an_empty_header_of_what_a_device_holds_is_answered(server: Server) -> None:
    """A device that holds no message yet sends it; whatever its body is, it is no fault of the server's."""
    headers = {STORED_MESSAGE_HEADER: "", "Content-Type": "application/protobuf"}
    knocker = Knocker(server)
    knocker.enroll(server.token("holds-nothing"))
    with knocker.fleet() as fleet:
        told = fleet.ActivateNode(ActivateNodeRequest(public_key=knocker.pem, heartbeat_interval=30))
    node = Node(node_id=told.node_id)
    for path, request in (("pull", PullMessagesRequest(node=node)), ("push", PushMessagesRequest(node=node))):
        for content in (request.SerializeToString(), b"\xff"):
            answer = knocker.signed(f"/v1/fleet/{path}-messages", content=content, headers=headers)
            assert answer.status_code < 500, answer.text
    assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text()


def test_a_profile_is_kept_when_it_is_signed_and_refused_when_not(server: Server, enrolled: Knocker) -> None:
    profile = {"memory": 512_000_000, "cores": 4, "examples": 12, "labels": {"good": 7, "bad": 5}}
    assert enrolled.signed("/fedtune/device/profile", json=profile).status_code == 200
    with server.operator() as connection:
        [device] = [one for one in connection.request_json("GET", "devices")["devices"] if one["name"] == "one"]
    assert device["profile"] == profile
    assert server.knock("POST", "/fedtune/device/profile", json=profile).status_code == 401


def test_tags_come_from_the_token_and_from_operators_alone(server: Server) -> None:
    knocker = Knocker(server)
    with server.operator() as connection:
        token = connection.request_json("POST", "tokens", {"name": "tagged", "tags": ["roof", "mains", "roof"]})[
            "token"
        ]
        assert knocker.enroll(token).status_code == 200
        assert tags_of(connection) == ["mains", "roof"]
        assert knocker.signed("/fedtune/device/profile", json={"memory": 1, "tags": ["lab"]}).status_code == 200
        assert knocker.signed("/fedtune/devices/tagged/tags", json={"add": ["lab"]}).status_code == 401
        assert tags_of(connection) == ["mains", "roof"]
        told = connection.request_json("POST", "devices/tagged/tags", {"add": ["lab"], "remove": ["roof", "never"]})
        assert told == {"device": "tagged", "tags": ["lab", "mains"]}
        for bad in ("two words", "", "x" * 33, ["a"]):
            with pytest.raises(ServerError, match="is not a list of tags; use small letters"):
                connection.request_json("POST", "devices/tagged/tags", {"add": [bad]})
        with pytest.raises(ServerError, match="there is no device 'nobody'; see them with fedtune server devices"):
            connection.request_json("POST", "devices/nobody/tags", {"add": ["lab"]})
        assert tags_of(connection) == ["lab", "mains"]
        changed = CliRunner().invoke(tag, ["tagged", "--add", "attic", "--remove", "lab"])
        assert changed.output == "tags of tagged: attic, mains\n"
        assert tags_of(connection) == ["attic", "mains"]
        listed = CliRunner().invoke(devices, ["--tag", "tagged", "lab", "--untag", "tagged", "attic"])
        assert tags_of(connection) == ["lab", "mains"]
    assert not listed.exception, listed.output
    [line] = [line.split() for line in listed.output.splitlines() if " tagged " in line]
    assert line == ["tagged", "away", "0", "MB", "lab", "mains"]


def test_a_change_of_tags_names_a_tag() -> None:
    done = CliRunner().invoke(tag, ["tagged"])
    assert done.exit_code == 2
    assert "name a tag with --add or --remove" in done.output


def tags_of(connection: OperatorClient) -> list[str]:
    [device] = [one for one in connection.request_json("GET", "devices")["devices"] if one["name"] == "tagged"]
    return list(device["tags"])


def test_a_run_cannot_be_submitted_without_an_operators_key(server: Server) -> None:
    assert server.knock("POST", "/fedtune/runs", json={"recipe": {}}).status_code == 401
    guess = {"Authorization": "Bearer guess"}
    assert "an unknown key" in error(server.knock("GET", "/fedtune/runs", headers=guess))
    assert server.refused("/fedtune/runs needs an operator's key, but the request has no operator key")


def test_flowers_own_control_and_runtime_paths_are_not_there(server: Server) -> None:
    with ControlHttpClient(server.url, verify=server.trust) as control:
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            control.StartRun(StartRunRequest())
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            control.ListNodes(ListNodesRequest())
    for path in ("/v1/runtime/pull-messages", "/v1/fleet/../control/start-run", "/docs", "/health", "/v1/fleet//x"):
        assert server.knock("POST", path).status_code in (404, 405), path
    assert server.refused("POST /v1/control/start-run")


def test_a_devices_key_is_no_operators_key(server: Server, enrolled: Knocker) -> None:
    assert enrolled.signed("/fedtune/runs", json={"recipe": {}}).status_code == 401
    assert enrolled.signed("/fedtune/tokens", json={}).status_code == 401
    assert enrolled.signed("/v1/control/start-run").status_code == 404


def test_an_unknown_device_is_refused_at_every_fleet_path(server: Server) -> None:
    stranger = Knocker(server)
    with stranger.fleet() as fleet:
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            fleet.ActivateNode(ActivateNodeRequest(public_key=stranger.pem, heartbeat_interval=30))
        with pytest.raises(httpx.HTTPStatusError, match="404"):
            fleet.RegisterNode(RegisterNodeFleetRequest(public_key=stranger.pem))
    assert server.refused("/v1/fleet/activate-node: this device is not enrolled here")


def test_a_key_that_is_shown_but_not_held_is_refused(server: Server, enrolled: Knocker) -> None:
    thief = Knocker(server)
    signing = NodeAuthHttpInterceptor(thief.private, enrolled.private.public_key())
    fleet = FleetHttpClient(server.url, interceptors=[signing], verify=server.trust)
    with fleet, pytest.raises(httpx.HTTPStatusError, match="401"):
        fleet.ActivateNode(ActivateNodeRequest(public_key=enrolled.pem, heartbeat_interval=30))
    assert server.refused("does not accept its signature")


def test_a_token_is_good_once(server: Server) -> None:
    token = server.token()
    assert Knocker(server).enroll(token, "two").status_code == 200
    again = Knocker(server).enroll(token, "three")
    assert (again.status_code, error(again)) == (
        403,
        "this token has been used already; ask the operator for a new one",
    )
    assert server.refused("this token has been used already")


def test_a_token_is_not_spent_by_an_enrolment_that_fails(server: Server) -> None:
    token = server.token()
    assert Knocker(server).enroll(token, "No Name").status_code == 400
    assert Knocker(server).enroll(token, "four").status_code == 200
    assert Knocker(server).enroll(server.token(), "four").status_code == 409


def test_plain_http_and_an_authority_nobody_trusts_are_refused_and_told(server: Server) -> None:
    host, port = server.place.settings.address
    with socket.create_connection((host, port)) as plain:
        plain.sendall(b"GET /fedtune/ca HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP/1.1 200" not in plain.recv(100)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/fedtune/ca", verify=ssl.create_default_context())
    assert server.refused("the TLS connection failed: HTTP_REQUEST")
    assert server.refused("the TLS connection failed: TLSV1_ALERT_UNKNOWN_CA")
    assert {line.actor for line in server.audit() if "TLS connection failed" in line.message} == {"127.0.0.1"}


def test_a_body_beyond_the_limit_is_refused(server: Server, enrolled: Knocker) -> None:
    assert server.knock("POST", "/fedtune/enroll", content=b"x" * (1 << 21)).status_code == 413
    assert server.knock("POST", "/fedtune/enroll", content=iter([b"x" * (1 << 20)] * 2)).status_code == 413
    with suppress(httpx.HTTPError):  # most of it is never read, so the answer may be lost
        assert enrolled.signed("/v1/fleet/push-object", content=b"x" * (1 << 26) + b"x").status_code == 413
    assert server.refused("/v1/fleet/push-object: the request is larger than the limit of 6291456 bytes")


def test_a_removed_device_is_shut_out(server: Server) -> None:
    knocker = Knocker(server)
    assert knocker.enroll(server.token("gone")).status_code == 200
    with server.operator() as connection:
        assert connection.request_json("DELETE", "devices/gone") == {"device": "gone"}
        with pytest.raises(ServerError, match="no device 'gone'"):
            connection.request_json("DELETE", "devices/gone")
    with knocker.fleet() as fleet, pytest.raises(httpx.HTTPStatusError, match="401"):
        fleet.ActivateNode(ActivateNodeRequest(public_key=knocker.pem, heartbeat_interval=30))


def test_a_recipe_that_does_not_hold_is_refused_in_a_sentence(server: Server) -> None:
    with server.operator() as connection, pytest.raises(ServerError, match=r"the recipe: .*'name' is missing"):
        connection.request_json("POST", "runs", {"recipe": {"task": "image-classification"}})


def below(server: Server) -> list[psutil.Process]:
    """The server's processes; some last for an instant only."""
    own = psutil.Process(server.process.pid)
    return [own, *own.children(recursive=True)]


def addresses(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return [one.laddr.ip for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
    return []


def arguments(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def test_only_the_door_has_a_port(server: Server) -> None:
    """Whoever can speak to the SuperLink starts runs as the server's user: no other user of the machine may."""
    listening = {process.pid: found for process in below(server) if (found := addresses(process))}
    assert listening == {server.process.pid: ["127.0.0.1"]}


_KNOCK = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
line = socket.socket(socket.AF_UNIX)
try:
    line.connect(sys.argv[1])
    print("connected")
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_cannot_reach_the_superlink(server: Server) -> None:
    socket_path = server.place.flower_home / "superlink.sock"
    assert socket_path.stat().st_mode & 0o777 == 0o600
    assert socket_path.parent.stat().st_mode & 0o777 == 0o700
    for folder in [*server.place.folder.parents][:-1]:  # whatever lies above it may be open to everybody
        folder.chmod(folder.stat().st_mode | 0o011)
    knocked = subprocess.run([sys.executable, "-I", "-c", _KNOCK, str(socket_path)], capture_output=True, text=True)
    assert knocked.stdout.strip() == "Permission denied", knocked
    control = ControlClient(socket_path)
    assert isinstance(control.list_online_nodes(), set)  # the server's own user can
    control.close()


def test_secrets_are_in_files_of_the_owner_only_and_in_no_log_or_argument(server: Server) -> None:
    key = json.loads(server.place.operator_file.read_text())["key"]
    for path in (server.place.ca_key_file, server.place.key_file, server.place.operator_file):
        assert path.stat().st_mode & 0o777 == 0o600
    logs = [path.read_text(errors="replace") for path in server.place.folder.rglob("*.log")] + [server.log.read_text()]
    assert not any(key in text for text in [*logs, *map(arguments, below(server))])
    assert key.encode() not in (server.place.folder.parent / "store.sqlite").read_bytes()


def test_a_second_server_in_the_same_home_is_refused(server: Server) -> None:
    with pytest.raises(StoreError, match="is up already"):
        run_server(open_server_home())
