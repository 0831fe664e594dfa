"""The device's own process: light, and there for good. It speaks with the server and hands work to the trainer.

An order is on this disk before it is trained, and its answer before it is sent, until the server has it: a process that
is killed and started again goes on where it was, and the answer is the same.
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
    """``tell`` sends what the device holds to its server; ``say`` is for whoever reads its log."""

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

    def run(self) -> None:
        """Take part until interrupted."""
        try:
            self._note("connecting")
            self._until_done(self._clock.synchronise)
            self._until_done(self._fleet.send_heartbeat)
            self._say("online")
            self._introduce(None)
            with self._heartbeat():
                self._work()
        finally:
            self._keeper.stop_trainer()
            if self._home.read_pending("order") is None:  # with one, being away for a moment must not look like leaving
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
        """The order that a process before this one did not finish; what is damaged of it is dropped."""
        message = self._home.read_pending("order")
        if message is not None:
            with suppress(UnexpectedReplyError):
                self._fleet.mark_message_stored(message)
                return message
        if self._home.clear_pending():
            self._say("the order in hand was damaged and is dropped; the server hands it out again")
        return None

    def _newest(self, message: bytes) -> bytes:
        """The last order that waits: whoever gave the earlier ones has stopped waiting for their answers."""
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
                self._introduce(holding)  # a new process has told of no data yet, and the server checks updates by it
            self._until_done(partial(self._send, message, result))
        except ObsoleteRequestError as error:
            self._say(f"an order was dropped: {error}")
        self._home.clear_pending()
        self._last_order = time.monotonic()

    def _kept_answer(self) -> Frame | None:
        content = self._home.read_pending("answer")
        with suppress(ValueError):
            return Frame.decode(content) if content is not None else None
        return None

    def _train(self, message: bytes) -> Frame:
        """Ask the trainer, and keep its answer."""
        started = time.monotonic()
        try:
            frame = self._until_done(partial(self._fetch, message))
            round_number = int(frame.header["round"])
        except DeviceError as error:  # another version of the protocol
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
        """What the trainer is to be asked: the state is in a file, so that while it trains nobody holds a copy.

        Where the disk is full the trainer is sent the state itself.
        """
        task = self._fleet.download_message(message)
        try:
            return Frame({**task.request, STATE: str(self._home.spool(task.payload))})
        except StoreError as error:
            self._say(f"{error}; going on without")
            return Frame({**task.request, STATE: ""}, task.payload)  # whatever the server may call so is overwritten

    def _report(self, round_number: int, result: Frame) -> None:
        kind, said = result.header["kind"], result.header
        if kind == "trained":
            done = (
                f"trained {count} examples" if (count := said["report"]["num_examples"]) else "scored the shared model"
            )
            self._say(f"round {round_number}: {done} in {said['seconds']:.1f} s")
            self._introduce(said["holding"])
        else:
            self._say(f"round {round_number}: {kind}: {said['detail']}")

    def _send(self, message: bytes, result: Frame) -> None:
        said = result.header
        if said["kind"] == "trained":
            self._fleet.push_update(message, result.payload, said["report"], said["seconds"])
        else:
            code, beginning = _REFUSALS[said["kind"]]
            problem = parse_problem(str(said.get("problem"))) or Problem(
                "code-failed"
            )  # an answer kept by an older one
            self._fleet.push_error(message, code, beginning + problem.text)

    def _introduce(self, holding: dict[str, Any] | None) -> None:
        """Tell the server what is here when that is new; it can do without."""
        if holding is None or holding != self._told:
            with suppress(httpx.HTTPError):
                self._tell(holding)
                self._told = holding

    def _hold(self, what: str, *pieces: bytes) -> None:
        """Keep something, if the disk can; a full one costs safety, not the round."""
        try:
            self._home.save_pending(what, *pieces)
        except StoreError as error:
            self._say(f"{error}; going on without")

    def _note(self, state: str, **more: Any) -> None:
        """What this device does now, on its disk when that is new: nobody needs to be told again and again."""
        note = {"state": state, "trainer": self._keeper.pid, **more}
        if note == self._noted:
            return
        with suppress(OSError):
            self._home.write_status(note)
            self._noted = note

    def _meet(self, trouble: str) -> None:
        """A trouble, or its end."""
        self._say(trouble)
        self._note("online" if trouble == RECOVERED_MESSAGE else "waiting", trouble=trouble)

    @contextmanager
    def _heartbeat(self) -> Iterator[None]:
        """Beat in a thread of its own, since training and slow lines hold this one up."""
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
