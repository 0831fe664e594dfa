"""The calls of Flower's Control API that a server needs. They use Flower's private client (flwr 1.41 and 1.42).

The API requires no key. The SuperLink therefore listens on a socket that only its owner can open.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.federation_config_pb2 import SimulationConfig
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufClientInterceptor, ProtobufRequestContext

from fedtune.errors import ServerError
from fedtune.flower import app_bundle
from fedtune.flower.unix_socket import ADDRESS, reroute

__all__ = ["ControlClient", "FlowerRunStatus", "RetryOnceInterceptor"]


@dataclass(frozen=True)
class FlowerRunStatus:
    """The state of a run on the SuperLink: ``status`` is pending, starting, running or finished."""

    status: str
    outcome: str
    details: str


class RetryOnceInterceptor:
    """Repeats a call once if the SuperLink closed the connection, which it does after 5 s without a request."""

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Return the response to the first or the second call."""
        try:
            return call_next(context)
        except httpx.RemoteProtocolError:
            return call_next(context)


class ControlClient:
    """A connection to the SuperLink's socket. Every method raises ServerError if it cannot be reached."""

    def __init__(self, socket: Path) -> None:
        interceptors: list[ProtobufClientInterceptor] = [
            RuntimeVersionHttpInterceptor(component_name="fedtune"),
            RetryOnceInterceptor(),
        ]
        self._client = ControlHttpClient(f"http://{ADDRESS}", interceptors=interceptors)
        reroute(self._client, socket)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def start_run(self, settings: dict[str, str], simulated: SimulationConfig | None = None) -> int:
        """Start a run of fedtune's app on devices, or on ``simulated`` nodes; return its id on the SuperLink."""
        content, _ = build_fab_from_files(app_bundle.make_app_files())
        fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
        config = user_config_to_proto(dict(settings))
        request = StartRunRequest(fab=fab, override_config=config, override_federation_config=simulated)
        with _reached():
            response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise ServerError("Flower's SuperLink did not accept the run; see fedtune server logs")
        return int(response.run_id)

    def get_run_status(self, flower_run_id: int) -> FlowerRunStatus:
        """Return the state of a run."""
        with _reached():
            found = self._client.ListRuns(ListRunsRequest(run_id=flower_run_id)).run_dict[flower_run_id].status
        return FlowerRunStatus(found.status, found.sub_status, found.details)

    def stop_run(self, flower_run_id: int) -> None:
        """Stop a run that has not ended yet."""
        if self.get_run_status(flower_run_id).status != "finished":
            with _reached():
                self._client.StopRun(StopRunRequest(run_id=flower_run_id))

    def register_node(self, public_key: bytes, name: str) -> int:
        """Register a device by its public key, given as PEM; return its node id."""
        with _reached():
            return int(self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def unregister_node(self, node: int) -> None:
        """Remove a device."""
        with _reached():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def list_online_nodes(self) -> set[int]:
        """Return the node ids of the devices that are online now."""
        with _reached():
            nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {int(node.node_id) for node in nodes if node.status == "online"}


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise ServerError(f"Flower's SuperLink refuses: {error.response.text.strip()[:300]}") from error
    except (httpx.HTTPError, ValueError) as error:
        raise ServerError(f"Flower's SuperLink cannot be reached ({error}); it will be restarted") from error
