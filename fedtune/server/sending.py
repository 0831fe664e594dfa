"""The messages of a run's rounds, and how many bytes each client has been sent for the answer that is to come."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from flwr.app import Message

from fedtune import paths
from fedtune.flower.exchange import make_train_messages
from fedtune.flower.reply_limit import OVERHEAD, raise_reply_limit
from fedtune.server.bases import Bases
from fedtune.server.downloads import Download, Downloads
from fedtune.server.run_clients import RunClients
from fedtune.training import RunContext
from fedtune.wire.client_update import TrainRequest

__all__ = ["Sending"]


class Sending:
    """Of one run."""

    def __init__(self, context: RunContext, run: str, bases: Bases) -> None:
        self.bases, self._run = bases, run
        self._request = TrainRequest(
            context.recipe.model_dump_json(), 0, 0, run, json.dumps(context.corpus.label_names)
        )
        self._asked: dict[int, tuple[int, int]] = {}

    def messages(self, clients: Sequence[int], run_clients: RunClients, downloads: Downloads) -> dict[int, Message]:
        """A message to each client, in client order; all that are sent the same share one copy of it.

        Who is asked for the same round again is sent the whole state.
        """
        self._expect(clients, run_clients, downloads)
        shared: dict[int, tuple[Download, list[int]]] = {}
        for client in clients:
            download = self._download(client, downloads)
            shared.setdefault(id(download), (download, []))[1].append(client)
        return _made(self._request, run_clients, shared.values(), downloads.round_number)

    def scoring_messages(
        self, clients: Sequence[int], run_clients: RunClients, downloads: Downloads
    ) -> dict[int, Message]:
        """The state whole to each client, which is to score it and not to train; no base is kept of it."""
        self._expect(clients, run_clients, downloads)
        shared: dict[int, tuple[Download, list[int]]] = {}
        for client in clients:
            download = replace(downloads.get_for_client(client, whole=True), base_digest=None)
            shared.setdefault(id(download.payload), (download, []))[1].append(client)
        return _made(replace(self._request, scoring=True), run_clients, shared.values(), downloads.round_number)

    def _download(self, client: int, downloads: Downloads) -> Download:
        """What a client is sent now, whose bytes count from here on."""
        begun, before = self._asked.get(client, (0, 0))
        again = begun == downloads.round_number
        download = downloads.get_for_client(client, whole=again)
        self._asked[client] = downloads.round_number, download.size + (before if again else 0)
        return download

    def _expect(self, clients: Sequence[int], run_clients: RunClients, downloads: Downloads) -> None:
        """Let the answers be as large as they may."""
        most = max((downloads.parts.get_for_client(client).most_bytes for client in clients), default=0)
        run_clients.expect(most)
        if run_clients.deployed:
            raise_reply_limit(paths.get_runs_folder() / self._run, most + OVERHEAD)

    def count_bytes_sent(self, client: int, downloads: Downloads) -> int:
        """Bytes a client was sent, as its answer is recorded; who was sent nothing counts what it would have been."""
        _, sent = self._asked.pop(client, (0, 0))
        return sent or downloads.get_for_client(client).size


def _made(
    request: TrainRequest, run_clients: RunClients, shared: Iterable[tuple[Download, Sequence[int]]], round_number: int
) -> dict[int, Message]:
    """The request of round ``round_number`` to each client, with the download it shares."""
    found: dict[int, Message] = {}
    for download, own in shared:
        one = replace(request, round=round_number, base_digest=download.base_digest, held_digest=download.held_digest)
        found |= make_train_messages(own, run_clients.node_ids, one, download.payload)
    return dict(sorted(found.items()))
