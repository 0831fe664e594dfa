"""The messages of a run's rounds, and the bytes that each client was sent for its next reply."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message

from fedtune import paths
from fedtune.algorithms import find_algorithm
from fedtune.flower.exchange import make_train_messages
from fedtune.flower.reply_limit import OVERHEAD, raise_reply_limit
from fedtune.recipe.required_plug_ins import encode_plug_ins, list_required_plug_ins
from fedtune.recipe.schema import Recipe
from fedtune.server.bases import Bases
from fedtune.server.downloads import Download, Downloads
from fedtune.server.feedback_files import find_feedback_round
from fedtune.server.run_clients import RunClients
from fedtune.training import RunContext
from fedtune.wire.client_update import TrainRequest
from fedtune.wire.recipe_codecs import uses_feedback

__all__ = ["Sending"]


class Sending:
    """The messages of one run."""

    def __init__(self, context: RunContext, run: str, bases: Bases) -> None:
        self.bases, self._run = bases, run
        self.plug_ins = list_required_plug_ins(context.recipe)
        self._request = TrainRequest(
            context.recipe.model_dump_json(),
            0,
            0,
            run,
            json.dumps(context.corpus.label_names),
            plug_ins=encode_plug_ins(self.plug_ins),
        )
        algorithm = find_algorithm(context.recipe)
        self._feeds_back = uses_feedback(context.recipe)
        self._tells_merged = algorithm is not None and algorithm.remembers
        self._asked: dict[int, tuple[int, int]] = {}

    def change_recipe(self, recipe: Recipe) -> None:
        """Send this recipe from the next round on."""
        self._request = replace(self._request, recipe=recipe.model_dump_json())

    def messages(self, clients: Sequence[int], run_clients: RunClients, downloads: Downloads) -> dict[int, Message]:
        """Return a message for each client, in client order. Equal payloads share one copy.

        A client that gets a second request for the same round receives the whole state.
        """
        self._expect(clients, run_clients, downloads)
        shared: dict[int, tuple[Download, list[int]]] = {}
        for client in clients:
            download = self._download(client, downloads)
            shared.setdefault(id(download), (download, []))[1].append(client)
        own = {client: self._list_own_fields(client) for client in clients}
        return _made(self._request, run_clients, shared.values(), downloads.round_number, own)

    def get_feedback_round(self, client: int) -> int:
        """Return the round of the estimates that error feedback goes on from; 0 if there are none."""
        return find_feedback_round(self._run, client, self.bases.get_merged_round(client)) if self._feeds_back else 0

    def _list_own_fields(self, client: int) -> dict[str, int]:
        merged = {"merged_round": self.bases.get_merged_round(client)} if self._tells_merged else {}
        return merged | ({"feedback_round": self.get_feedback_round(client)} if self._feeds_back else {})

    def scoring_messages(
        self, clients: Sequence[int], run_clients: RunClients, downloads: Downloads
    ) -> dict[int, Message]:
        """Return messages with the whole state for clients that score it. They do not save its base weights."""
        self._expect(clients, run_clients, downloads)
        shared: dict[int, tuple[Download, list[int]]] = {}
        for client in clients:
            download = replace(downloads.get_for_client(client, whole=True), base_digest=None)
            shared.setdefault(id(download.payload), (download, []))[1].append(client)
        return _made(replace(self._request, scoring=True), run_clients, shared.values(), downloads.round_number)

    def _download(self, client: int, downloads: Downloads) -> Download:
        """Return the download of a client, and count its bytes."""
        begun, before = self._asked.get(client, (0, 0))
        again = begun == downloads.round_number
        download = downloads.get_for_client(client, whole=again)
        self._asked[client] = downloads.round_number, download.size + (before if again else 0)
        return download

    def _expect(self, clients: Sequence[int], run_clients: RunClients, downloads: Downloads) -> None:
        """Set the size limit of the replies."""
        most = max((downloads.parts.get_for_client(client).most_bytes for client in clients), default=0)
        run_clients.expect(most)
        if run_clients.deployed:
            raise_reply_limit(paths.get_runs_folder() / self._run, most + OVERHEAD)

    def count_bytes_sent(self, client: int, downloads: Downloads) -> int:
        """Return the bytes sent to a client when its reply is recorded; without a request, those it would have been."""
        _, sent = self._asked.pop(client, (0, 0))
        return sent or downloads.get_for_client(client).size


def _made(
    request: TrainRequest,
    run_clients: RunClients,
    shared: Iterable[tuple[Download, Sequence[int]]],
    round_number: int,
    own_fields: Mapping[int, Mapping[str, int]] | None = None,
) -> dict[int, Message]:
    """Return a message with the train request and the shared download for each client."""
    found: dict[int, Message] = {}
    for download, own in shared:
        one = replace(request, round=round_number, base_digest=download.base_digest, held_digest=download.held_digest)
        found |= make_train_messages(own, run_clients.node_ids, one, download.payload, own_fields)
    return dict(sorted(found.items()))
