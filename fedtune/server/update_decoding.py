"""A coded message becomes an update on disk, tensor by tensor."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedtune.files import replace_file_atomically
from fedtune.server.feedback_files import read_estimates, write_estimates
from fedtune.wire.recipe_codecs import MessagePlace
from fedtune.wire.stored_state import StoredState
from fedtune.wire.tensor_payload import iter_packed
from fedtune.wire.update_message import Estimates, UpdateLayout, receive_message

__all__ = ["UpdateDecoder"]


@dataclass(frozen=True)
class UpdateDecoder:
    """Decodes the message of one client in one round."""

    run_id: str
    layout: UpdateLayout
    place: MessagePlace
    feeds_back: bool

    def write_update(self, message: bytes, path: Path) -> Estimates:
        """Write the decoded update to ``path``, and return the estimates that it goes on from.

        Raise ClientUpdateError if the message is invalid; then nothing is written.
        """
        known = read_estimates(self.run_id, self.place.client, self.place.feedback_round)
        received = receive_message(self.layout, message, self.place, known)
        with replace_file_atomically(path) as beside, beside.open("wb") as file:
            file.writelines(iter_packed(received.list_forms(), received.decode_delta))
        return received.earlier

    def keep_estimates(self, path: Path, earlier: Estimates) -> None:
        """Keep the update at ``path``, which has passed all checks, as the client's next estimate."""
        if not self.feeds_back:
            return
        update = StoredState(path)
        following: dict[str, Tensor] = {**earlier, **{name: update[name] for name in self.layout.coded}}
        rounds = self.place.feedback_round, self.place.round_number
        write_estimates(self.run_id, self.place.client, rounds, following)
