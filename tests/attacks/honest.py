"""An honest device in a process of its own, so that what an attacker's process is busy with does not count.

``python -m tests.attacks.honest URL CA KEY NODE`` beats and asks for work, each time on a new connection as after a cut
line, and prints how long that took, or what went wrong. It ends with its standard input.
"""

import json
import ssl
import sys
import threading
import time
from pathlib import Path

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

__all__ = ["serve"]

_EVERY = 0.2


def serve(url: str, ca: Path, key: Path, number: int) -> None:
    """Go on for ever."""
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    trust = ssl.create_default_context(cafile=str(ca))
    signing, node = NodeAuthHttpInterceptor(private, private.public_key()), Node(node_id=number)
    while True:
        started, failure = time.monotonic(), ""
        try:
            with FleetHttpClient(url, interceptors=[signing], verify=trust) as fleet:
                fleet.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=node, heartbeat_interval=30))
                fleet.PullMessages(PullMessagesRequest(node=node))
        except (httpx.HTTPError, ValueError) as error:
            failure = repr(error)
        print(json.dumps([time.monotonic() - started, failure]), flush=True)
        time.sleep(_EVERY)


if __name__ == "__main__":
    given = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    threading.Thread(target=serve, args=given, daemon=True).start()
    sys.stdin.read()
