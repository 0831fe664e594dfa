"""The trainer as its device sees it: started when there is work, watched while it works, ended when it rests too long.

Nothing here imports torch.
"""

import socket
import subprocess
import time
from contextlib import suppress

import psutil

from fedtune.child_processes import environment, make_isolated_command
from fedtune.device.trainer_channel import Frame, TrainerChannel
from fedtune.errors import MemoryBudgetError
from fedtune.wire.protocol_codes import Problem

__all__ = ["TrainerSupervisor"]

_LOOK_SECONDS = 0.2
_TRIES = 2
"""A round comes out the same however often it is begun, so a trainer that was killed from outside is worth another."""
_HALVINGS = 3
"""So often is a trainer that held too much begun again with half the examples at a time."""
_SHORT = 0.05
"""Share of the machine's memory below which a resting trainer makes room."""


class TrainerSupervisor:
    """One trainer for examples from ``source`` that may hold ``budget`` bytes and rest for ``idle`` seconds."""

    def __init__(self, source: str, budget: int, idle: float) -> None:
        self._source, self._budget, self._idle = source, budget, idle
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: TrainerChannel | None = None
        self._worked = 0.0
        self._recipe: object = None
        self._halvings = 0
        self._declines: Problem | None = None

    @property
    def pid(self) -> int | None:
        """The trainer's process number while there is one."""
        return self._process.pid if self._process is not None else None

    def run_request(self, frame: Frame) -> Frame:
        """The trainer's answer, or one that says why there is none."""
        if self._recipe != frame.header.get("recipe"):
            self._recipe, self._halvings, self._declines = frame.header.get("recipe"), 0, None
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
                if not rested:  # otherwise another recipe may have been held as well
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
        """Send and wait; EOFError when the trainer dies, BudgetError or MemoryError when it holds more than it may.

        BudgetError before it trains, when fewer examples at a time would not help; MemoryError while it does.
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
        """The trainer's next frame; MemoryError when it holds more than it may before that comes."""
        while not channel.wait_until_ready(_LOOK_SECONDS):
            with suppress(psutil.NoSuchProcess):
                if held.memory_info().rss > self._budget:
                    raise MemoryError
        return channel.receive()

    def _started(self) -> tuple[TrainerChannel, psutil.Process]:
        if self._process is None or self._channel is None or self._process.poll() is not None:
            self.stop_trainer()
            ours, theirs = socket.socketpair()
            numbers = str(self._budget), str(self._halvings)
            command = make_isolated_command("fedtune.device.trainer", str(theirs.fileno()), self._source, *numbers)
            self._process = subprocess.Popen(
                command, env=environment(), stdin=subprocess.PIPE, pass_fds=[theirs.fileno()]
            )
            theirs.close()
            self._channel = TrainerChannel(ours)
        return self._channel, psutil.Process(self._process.pid)

    def stop_if_idle(self) -> None:
        """Called while there is no work: end the trainer when it rested too long or memory is short."""
        if self._process is None:
            return
        memory = psutil.virtual_memory()
        if time.monotonic() - self._worked > self._idle or memory.available < _SHORT * memory.total:
            self.stop_trainer()

    def stop_trainer(self) -> None:
        """End the trainer at once; what it was doing is lost."""
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            if self._process.stdin is not None:
                self._process.stdin.close()
        self._process = self._channel = None

    def _ended(self) -> Problem:
        """How the trainer that is gone ended."""
        code = self._process.wait() if self._process is not None else 0
        self.stop_trainer()
        if code < 0:
            return Problem("trainer-killed", {"signal": -code, "tries": _TRIES})
        return Problem("trainer-ended", {"code": code, "tries": _TRIES})

    def _allowed(self) -> dict[str, int]:
        return {"allowed_mb": round(self._budget / 1e6)}


def _without_update(kind: str, problem: Problem) -> Frame:
    return Frame({"kind": kind, "problem": problem.text, "detail": problem.sentence})
