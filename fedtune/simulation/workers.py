"""Who runs the ClientApp of simulated nodes: this process, one client after the other, or a pool of processes.

A pool shares the base model: its storages lie in shared memory, and a worker copies only what is trained.
"""

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.device.client_app import app as client_app
from fedtune.flower.message_identity import set_node_identity
from fedtune.training import RunContext, set_run_context

__all__ = ["ClientWorkers", "ProcessPoolWorkers", "SequentialWorkers"]

ClientResult = tuple[Message, Context] | Exception
_PATIENCE = 0.05
_CLIENT = 2


class ClientWorkers(ABC):
    """Takes messages and gives back answers, in whatever order they are done."""

    @abstractmethod
    def submit(self, message_id: str, message: Message, context: Context) -> None:
        """Queue a message."""

    @abstractmethod
    def collect_results(self) -> list[tuple[str, ClientResult]]:
        """Answers not yet given back; waits a moment when there is none."""

    @abstractmethod
    def discard_pending(self) -> None:
        """Drop what is queued and whatever comes of what runs."""

    @abstractmethod
    def close(self) -> None:
        """Let go of processes."""


class SequentialWorkers(ClientWorkers):
    """One client after the other in this process and thread; each is run when its answer is asked for."""

    def __init__(self, app: ClientApp) -> None:
        self._app = app
        self._queue: deque[tuple[str, Message, Context]] = deque()

    def submit(self, message_id: str, message: Message, context: Context) -> None:
        """Queue a message."""
        self._queue.append((message_id, message, context))

    def collect_results(self) -> list[tuple[str, ClientResult]]:
        """Run the next client."""
        if not self._queue:
            return []
        message_id, message, context = self._queue.popleft()
        try:
            return [(message_id, (self._app(message, context), context))]
        except Exception as error:
            return [(message_id, error)]

    def discard_pending(self) -> None:
        """Drop what is queued."""
        self._queue.clear()

    def close(self) -> None:
        """There is nothing to let go of."""


class ProcessPoolWorkers(ClientWorkers):
    """``processes`` workers that share the run context's base model; when one is killed, all are replaced.

    Messages wait here and not in the executor: one that breaks chokes on futures that were cancelled.
    """

    def __init__(self, run_context: RunContext, processes: int, app: ClientApp = client_app) -> None:
        run_context.share_memory()
        self._run_context, self._processes, self._app = run_context, processes, app
        self._queue: deque[tuple[str, Message, Context]] = deque()
        self._futures: dict[Future[tuple[Message, Context]], str] = {}
        self._executor, self._lifeline = self._start()

    def _start(self) -> tuple[ProcessPoolExecutor, Connection]:
        """Workers, and the end of a pipe they do not outlive, whether it is closed or this process is killed."""
        context = torch.multiprocessing.get_context("spawn")
        watched, lifeline = context.Pipe(duplex=False)
        begin = (self._run_context, watched)
        return ProcessPoolExecutor(self._processes, mp_context=context, initializer=_begin, initargs=begin), lifeline

    def submit(self, message_id: str, message: Message, context: Context) -> None:
        """Queue a message."""
        self._queue.append((message_id, message, context))

    def collect_results(self) -> list[tuple[str, ClientResult]]:
        """Answers that have come back."""
        while self._queue and len(self._futures) <= self._processes:
            message_id, message, context = self._queue.popleft()
            self._futures[self._hand_over(message, context)] = message_id
        done, _ = wait(self._futures, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
        return [(self._futures.pop(future), _result(future)) for future in done]

    def _hand_over(self, message: Message, context: Context) -> Future[tuple[Message, Context]]:
        with _interrupts_held_back():
            try:
                return self._executor.submit(_answer, self._app, message, context)
            except BrokenProcessPool:
                self.close()
                self._executor, self._lifeline = self._start()
                return self._executor.submit(_answer, self._app, message, context)

    def discard_pending(self) -> None:
        """Drop what is queued; of what runs, nobody will ask for the answer."""
        self._queue.clear()
        self._futures.clear()

    def close(self) -> None:
        """End the processes at once, whatever they are doing."""
        _let_go_of_half_written_messages(self._executor)
        self._lifeline.close()
        self._executor.shutdown()


def _let_go_of_half_written_messages(executor: ProcessPoolExecutor) -> None:
    """Early releases of Python 3.11 wait for ever if workers end while a message to them is being written.

    Later ones close the parent's own reading end, so that the writer gets an error, which is ignored.
    """
    queue: Any = vars(executor).get("_call_queue")
    if queue is not None:
        queue._reader.close()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until the block is over; processes started inside never see it and leave it to this one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result(future: Future[tuple[Message, Context]]) -> ClientResult:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        return RuntimeError("a worker process was killed, perhaps for want of memory")
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _begin(run_context: RunContext, watched: Connection) -> None:
    """Make a fresh worker process ready: it ends with its parent, and owns what it trains."""
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    set_node_identity(_CLIENT)
    run_context.copy_writable_tensors()
    set_run_context(run_context)


def _end_with(watched: Connection) -> None:
    watched.poll(None)
    os._exit(1)


def _answer(app: ClientApp, message: Message, context: Context) -> tuple[Message, Context]:
    return app(message, context), context
