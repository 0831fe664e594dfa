"""The supervisor starts the trainer process for a request, watches its memory, and ends it when it is idle too long.

This module does not import torch.
"""

import socket
import subprocess
import time
from contextlib import suppress

import psutil

from fedtune.child_processes import environment, make_isolated_command
from fedtune.device.held_memory import read_held_bytes
from fedtune.device.plan_shortage import find_plan_shortage
from fedtune.device.trainer_channel import Frame, TrainerChannel
from fedtune.device.trainer_limit import ProcessLimit, TrainerLimit
from fedtune.errors import MemoryBudgetError
from fedtune.wire.protocol_codes import Problem

__all__ = ["TrainerSupervisor"]

_LOOK_SECONDS = 0.05
_TRIES = 2
"""How often a request is tried if the trainer is killed. A repeated round gives the same result."""
_HALVINGS = 3
"""How often the trainer is restarted with half the micro-batch size after it used too much memory."""
_SHORT = 0.05
"""The fraction of free memory on the machine below which an idle trainer is ended."""


class TrainerSupervisor:
    """One trainer for the examples of ``source``, with at most ``budget`` bytes of memory and ``idle`` seconds idle.

    ``limit`` holds it to the budget from outside, beside what the trainer and this process do themselves.
    """

    def __init__(self, source: str, budget: int, idle: float, limit: TrainerLimit | None = None) -> None:
        self._source, self._budget, self._idle = source, budget, idle
        self._limit, self._held = limit or ProcessLimit(), 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: TrainerChannel | None = None
        self._worked = 0.0
        self._recipe: object = None
        self._halvings = 0
        self._declines: Problem | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the trainer; None if it is not running."""
        return self._process.pid if self._process is not None else None

    def run_request(self, frame: Frame) -> Frame:
        """Return the trainer's result, or a frame that explains why there is none."""
        if self._recipe != frame.header.get("recipe"):
            self._recipe, self._halvings = frame.header.get("recipe"), 0
            self._declines = find_plan_shortage(self._recipe, frame.header.get("client"), self._budget)
        if self._declines is not None:
            return _without_update("declined", self._declines)
        killed, problem = 0, Problem("code-failed")
        while killed < _TRIES:
            rested = self._process is not None
            try:
                return self._exchange(frame)
            except EOFError:
                killed, problem = killed + 1, self._ended()
            except MemoryBudgetError as error:
                self.stop_trainer()
                if not rested:  # otherwise the memory may be that of another recipe
                    self._declines = Problem(error.code, error.counts)
                    return _without_update("declined", self._declines)
            except MemoryError:
                self.stop_trainer()
                self._halvings += 1
                if self._halvings > _HALVINGS:
                    self._declines = Problem("memory-training", self._allowed())
                    return _without_update("died", self._declines)
        return _without_update("died", problem)

    def _exchange(self, frame: Frame) -> Frame:
        """Send a request and return the result. Raise EOFError if the trainer dies.

        Raise MemoryBudgetError if it exceeds its memory budget before training, where smaller micro-batches would not
        help, and MemoryError if it does so during training.
        """
        channel, held = self._started()
        channel.send(frame)
        try:
            reply = self._received(channel, held)
        except MemoryError as error:
            allowed = self._allowed()
            raise MemoryBudgetError(
                "model and data need too much memory", code="memory-model", counts=allowed
            ) from error
        if reply.header["kind"] == "fits":
            reply = self._received(channel, held)
        self._worked = time.monotonic()
        return reply

    def _received(self, channel: TrainerChannel, held: psutil.Process) -> Frame:
        """Return the trainer's next frame; raise MemoryError if it exceeds its memory budget before."""
        while not channel.wait_until_ready(_LOOK_SECONDS):
            with suppress(psutil.NoSuchProcess):
                self._held = read_held_bytes(held)
                if self._held > self._budget:
                    raise MemoryError
        try:
            return channel.receive()
        except EOFError:
            if self._limit.has_killed(self._held):
                raise MemoryError from None
            raise

    def _started(self) -> tuple[TrainerChannel, psutil.Process]:
        if self._process is None or self._channel is None or self._process.poll() is not None:
            self.stop_trainer()
            ours, theirs = socket.socketpair()
            numbers = str(self._budget), str(self._halvings)
            command = make_isolated_command("fedtune.device.trainer", str(theirs.fileno()), self._source, *numbers)
            self._held = 0
            self._process = subprocess.Popen(
                self._limit.wrap_command(command),
                env=environment(),
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            self._channel = TrainerChannel(ours)
        return self._channel, psutil.Process(self._process.pid)

    def stop_if_idle(self) -> None:
        """End the trainer if it was idle too long or if memory is short. Called while there is no request."""
        if self._process is None:
            return
        memory = psutil.virtual_memory()
        if time.monotonic() - self._worked > self._idle or memory.available < _SHORT * memory.total:
            self.stop_trainer()

    def stop_trainer(self) -> None:
        """Kill the trainer. A request in progress is lost."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process = self._channel = None

    def close(self) -> None:
        """Kill the trainer and remove its limit."""
        self.stop_trainer()
        self._limit.close()

    def _ended(self) -> Problem:
        """Return how the trainer ended."""
        code = self._process.wait() if self._process is not None else 0
        self.stop_trainer()
        if code < 0:
            return Problem("trainer-killed", {"signal": -code, "tries": _TRIES})
        return Problem("trainer-ended", {"code": code, "tries": _TRIES})

    def _allowed(self) -> dict[str, int]:
        return {"allowed_mb": round(self._budget / 1e6)}


def _without_update(kind: str, problem: Problem) -> Frame:
    return Frame({"kind": kind, "problem": problem.text, "detail": problem.sentence})
