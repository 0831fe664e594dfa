"""The trainer process of a device. It imports torch once, and keeps the model and the data in memory.

``python -P -m fedtune.device.trainer DESCRIPTOR SOURCE BUDGET HALVINGS`` reads requests from an inherited socket and
replies to each. Before training it sends a frame that says that the round fits in memory. It imports only installed
packages. It exits when its standard input is closed, so it ends together with the process that started it.
"""

import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from fedtune.device.device_home import DeviceHome
from fedtune.device.held_base import leave_others
from fedtune.device.idle_memory import release_idle_memory
from fedtune.device.limited_round import keep_within_budget
from fedtune.device.local_data import LocalData, summarise_local_data
from fedtune.device.local_round import read_payload, run_local_round
from fedtune.device.memory_budget import choose_micro_batch_size
from fedtune.device.own_memory import delete_unneeded_memory
from fedtune.device.problems import problem_of
from fedtune.device.trainer_channel import STATE, Frame, TrainerChannel
from fedtune.errors import ClientUpdateError, FedtuneError, MemoryBudgetError, NoTaskError, StoreError
from fedtune.memory.allocator import fix_mmap_threshold
from fedtune.models.blocks.preference import prefer_plain_blocks
from fedtune.plan.device_plans import describe_device_plan, limit_micro_batch
from fedtune.training import RunContext
from fedtune.wire.client_update import TrainRequest

__all__ = ["main"]


def main(descriptor: int, source: str, budget: int, halvings: int) -> None:
    """Reply to requests until the other end of the socket is closed."""
    fix_mmap_threshold()
    prefer_plain_blocks()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    channel, trainer = TrainerChannel(socket.socket(fileno=descriptor)), Trainer(source, budget, halvings)
    while True:
        try:
            channel.send(trainer.run_request(channel.receive(), lambda: channel.send(Frame({"kind": "fits"}))))
        except EOFError:
            return


class Trainer:
    """``budget`` is the limit of memory in bytes, which holds while it trains.

    The batch is halved at least ``halvings`` times.
    """

    def __init__(self, source: str, budget: int, halvings: int) -> None:
        self._supply, self._budget, self._halvings = LocalData(source, budget), budget, halvings
        self._looked: RunContext | None = None
        self._micro: int | None = None

    def run_request(self, frame: Frame, fits: Callable[[], None]) -> Frame:
        """Train and return the result. ``fits`` is called just before training.

        After an error, the result has a ``problem``, which may be sent to the server, and a ``detail``, which must not.
        """
        try:
            path = frame.header.pop(STATE, "")
            return self._train(TrainRequest(**frame.header), Path(path) if path else frame.payload, fits)
        except Exception as error:
            kind = "declined" if isinstance(error, MemoryBudgetError | NoTaskError) else "failed"
            detail = str(error) if isinstance(error, FedtuneError) else repr(error)
            return Frame({"kind": kind, "problem": problem_of(error).text, "detail": detail})

    def _train(self, request: TrainRequest, payload: bytes | Path, fits: Callable[[], None]) -> Frame:
        context, rows = self._supply.get_context(request)
        release_idle_memory(context)
        state = _state(payload, context, request.client)  # before memory is estimated
        if self._looked is not context:
            fitting = choose_micro_batch_size(context, rows, request.round, self._budget, self._halvings)
            self._micro = limit_micro_batch(context.recipe, request.client, self._budget, fitting)
            self._looked = context
        fits()
        folder = DeviceHome().get_local_state_folder(request.run_id)
        leave_others(folder)
        delete_unneeded_memory(folder)
        with keep_within_budget(self._budget, context.recipe.train.threads):
            deltas, report = run_local_round(request, state, context, rows, folder, self._micro)
        self._micro = report.micro_batch_size or self._micro  # it may have been halved
        plan = describe_device_plan(context.recipe, request.client, self._budget)
        told = {"report": report.to_fields(), "holding": summarise_local_data(context, rows), "plan": plan}
        release_idle_memory(context)
        return Frame({"kind": "trained", **told}, deltas)


def _state(payload: bytes | Path, context: RunContext, client: int) -> Mapping[str, Tensor]:
    """Return the state that a request starts from; raise ClientUpdateError if it does not fit the model."""
    try:
        return read_payload(payload, context, client)
    except (ClientUpdateError, StoreError) as error:
        raise ClientUpdateError(str(error), code="order-unreadable") from error


def _end_with_parent() -> None:
    """Exit when the parent process ends. Standard input is a pipe that closes then; nothing is ever written to it."""
    os.read(0, 1)  # sys.stdin would hold its lock while the interpreter exits
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
