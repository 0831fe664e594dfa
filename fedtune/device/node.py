"""The device process, which runs all the time and does not import torch. It polls the server and calls the trainer.

A train request is saved to disk before training, and its result before it is sent. Both stay until the server has the
result. A process that was killed therefore continues with the same request, and sends the same result.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import httpx

from fedtune.device.backoff import choose_poll_delay
from fedtune.device.device_home import DeviceHome
from fedtune.device.retry import RECOVERED_MESSAGE, RetryLoop
from fedtune.device.server_clock import ServerClock
from fedtune.device.trainer_channel import STATE, Frame
from fedtune.device.trainer_supervisor import TrainerSupervisor
from fedtune.errors import DeviceError, StoreError, UnexpectedReplyError
from fedtune.flower.fleet_client import FleetClient, ObsoleteRequestError
from fedtune.wire import error_codes
from fedtune.wire.protocol_codes import Problem, parse_problem

__all__ = ["DeviceNode"]

_BEAT_SECONDS = 15.0
_REFUSALS = {
    "declined": (error_codes.TRAINING_FAILED, error_codes.DECLINED_PREFIX),
    "died": (error_codes.TRAINER_DIED, ""),
    "failed": (error_codes.TRAINING_FAILED, ""),
}


class DeviceNode:
    """``tell`` sends the device's profile to the server; ``say`` writes a line to the device's log."""

    def __init__(
        self,
        home: DeviceHome,
        fleet: FleetClient,
        keeper: TrainerSupervisor,
        clock: ServerClock,
        tell: Callable[[dict[str, Any] | None], None],
        say: Callable[[str], None],
    ) -> None:
        self._home, self._fleet, self._keeper, self._clock = home, fleet, keeper, clock
        self._until_done = RetryLoop(self._meet, clock.synchronise).call_until_success
        self._tell, self._say = tell, say
        self._told: dict[str, Any] | None = None
        self._noted: dict[str, Any] = {}
        self._last_order = 0.0
        self._plan: str | None = None

    def run(self) -> None:
        """Take part in runs until interrupted."""
        try:
            self._note("connecting")
            self._until_done(self._clock.synchronise)
            self._until_done(self._fleet.send_heartbeat)
            self._say("online")
            self._introduce(None)
            with self._heartbeat():
                self._work()
        finally:
            self._keeper.close()
            if self._home.read_pending("order") is None:  # with a pending request, the device is coming back
                with suppress(httpx.HTTPError, UnexpectedReplyError):
                    self._fleet.deactivate_node()
            self._note("stopped")

    def _work(self) -> None:
        if (message := self._order_in_hand()) is not None:
            self._carry_out(message)
        while True:
            self._note("online")
            message = self._until_done(self._fleet.pull_message)
            if message is not None:
                self._carry_out(self._newest(message))
            else:
                self._keeper.stop_if_idle()
                time.sleep(choose_poll_delay(time.monotonic() - self._last_order))

    def _order_in_hand(self) -> bytes | None:
        """Return the train request that an earlier process did not finish. Damaged files are deleted."""
        message = self._home.read_pending("order")
        if message is not None:
            with suppress(UnexpectedReplyError):
                self._fleet.mark_message_stored(message)
                return message
        if self._home.clear_pending():
            self._say("the saved train request is damaged and was deleted; the server sends it again")
        return None

    def _newest(self, message: bytes) -> bytes:
        """Return the newest train request. The server no longer waits for results of earlier ones."""
        later: bytes | None = message
        while later is not None:
            message = later
            self._hold("order", message)
            self._fleet.mark_message_stored(message)
            later = self._until_done(self._fleet.pull_message)
        return message

    def _carry_out(self, message: bytes) -> None:
        self._last_order = time.monotonic()
        try:
            result = self._kept_answer()
            if result is None:
                result = self._train(message)
            elif isinstance(holding := result.header.get("holding"), dict):
                self._introduce(holding)  # a new process has sent no profile yet; the server checks updates against it
            self._until_done(partial(self._send, message, result))
        except ObsoleteRequestError as error:
            self._say(f"a train request was dropped: {error}")
        self._home.clear_pending()
        self._last_order = time.monotonic()

    def _kept_answer(self) -> Frame | None:
        content = self._home.read_pending("answer")
        with suppress(ValueError):
            return Frame.decode(content) if content is not None else None
        return None

    def _train(self, message: bytes) -> Frame:
        """Run the train request in the trainer, and save its result."""
        started = time.monotonic()
        try:
            frame = self._until_done(partial(self._fetch, message))
            round_number = int(frame.header["round"])
        except DeviceError as error:  # the server has another protocol version
            self._say(str(error))
            return _without_update(Problem(error.code, error.counts), str(error))
        except (KeyError, TypeError, ValueError) as error:
            return _without_update(Problem("order-unreadable"), repr(error))
        self._note("scoring" if frame.header.get("scoring") else "training", round=round_number)
        result = self._keeper.run_request(frame)
        self._home.drop_state()
        result.header["seconds"] = time.monotonic() - started
        self._report(round_number, result)
        self._hold("answer", *result.pieces())
        return result

    def _fetch(self, message: bytes) -> Frame:
        """Return the frame for the trainer. The state is in a file, so that no process holds a copy during training.

        If the disk is full, the frame contains the state itself.
        """
        task = self._fleet.download_message(message)
        try:
            return Frame({**task.request, STATE: str(self._home.spool(task.payload))})
        except StoreError as error:
            self._say(f"{error}; going on without")
            return Frame({**task.request, STATE: ""}, task.payload)  # the server must not choose a file

    def _report(self, round_number: int, result: Frame) -> None:
        kind, said = result.header["kind"], result.header
        if kind == "trained":
            counted = "targets" if "tokens" in said["holding"] else "examples"
            done = (
                f"trained {count} {counted}" if (count := said["report"]["num_examples"]) else "scored the shared model"
            )
            self._say(f"round {round_number}: {done} in {said['seconds']:.1f} s")
            self._tell_plan(said.get("plan"))
            self._introduce(said["holding"])
        else:
            self._say(f"round {round_number}: {kind}: {said['detail']}")

    def _tell_plan(self, plan: str | None) -> None:
        """Log the plan that the device trains with if it is another one than before."""
        if plan is not None and plan != self._plan:
            self._say(f"plan: {plan}")
        self._plan = plan

    def _send(self, message: bytes, result: Frame) -> None:
        said = result.header
        if said["kind"] == "trained":
            self._fleet.push_update(message, result.payload, said["report"], said["seconds"])
        else:
            code, beginning = _REFUSALS[said["kind"]]
            problem = parse_problem(str(said.get("problem"))) or Problem(
                "code-failed"
            )  # a result that an older fedtune saved
            self._fleet.push_error(message, code, beginning + problem.text)

    def _introduce(self, holding: dict[str, Any] | None) -> None:
        """Send the profile if it is new. Errors are ignored, because the server does not depend on it."""
        if holding is None or holding != self._told:
            with suppress(httpx.HTTPError):
                self._tell(holding)
                self._told = holding

    def _hold(self, what: str, *pieces: bytes) -> None:
        """Save a request or a result. If the disk is full, continue: only a killed process needs the file."""
        try:
            self._home.save_pending(what, *pieces)
        except StoreError as error:
            self._say(f"{error}; going on without")

    def _note(self, state: str, **more: Any) -> None:
        """Write the state of the device to disk if it has changed."""
        note = {"state": state, "trainer": self._keeper.pid, **more}
        if note == self._noted:
            return
        with suppress(OSError):
            self._home.write_status(note)
            self._noted = note

    def _meet(self, trouble: str) -> None:
        """Log a problem with the connection, or its end."""
        self._say(trouble)
        self._note("online" if trouble == RECOVERED_MESSAGE else "waiting", trouble=trouble)

    @contextmanager
    def _heartbeat(self) -> Iterator[None]:
        """Send heartbeats from another thread while the block runs, because training blocks this one."""
        over = threading.Event()
        thread = threading.Thread(target=self._beat, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(1.0)

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(_BEAT_SECONDS):
            with suppress(httpx.HTTPError, UnexpectedReplyError):
                self._fleet.send_heartbeat()


def _without_update(problem: Problem, detail: str) -> Frame:
    return Frame({"kind": "failed", "problem": problem.text, "detail": detail})
