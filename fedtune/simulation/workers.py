"""Runs the ClientApp of simulated nodes, one after another in this process or in a pool of processes.

The pool shares the base model in shared memory. A worker copies only the tensors that are trained.
"""

import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.device.client_app import app as client_app
from fedtune.errors import RunError
from fedtune.file_limit import raise_file_limit
from fedtune.flower.message_identity import set_node_identity
from fedtune.interrupts import start_without_interrupts
from fedtune.simulation.handed_context import HandedContext
from fedtune.training import RunContext, set_run_context

__all__ = ["ClientWorkers", "ProcessPoolWorkers", "SequentialWorkers"]

ClientResult = tuple[Message, Context] | Exception
_PATIENCE = 0.05
_END_OF_BROKEN_POOL = 2.0
_CLIENT = 2
_OWN_FILES = 256
"""Open files of a process beside its shared tensors."""


class ClientWorkers(ABC):
    """Takes messages and returns replies in the order in which they are finished."""

    @abstractmethod
    def submit(self, message_id: str, message: Message, context: Context) -> None:
        """Queue a message."""

    @abstractmethod
    def collect_results(self) -> list[tuple[str, ClientResult]]:
        """Return new replies, after waiting briefly if there is none."""

    @abstractmethod
    def discard_pending(self) -> None:
        """Drop queued messages and the replies of running clients."""

    @abstractmethod
    def close(self) -> None:
        """Release the processes."""


class SequentialWorkers(ClientWorkers):
    """Runs one client after another in this process and thread. Each runs when its reply is collected."""

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
        """Drop queued messages."""
        self._queue.clear()

    def close(self) -> None:
        """Do nothing: there are no processes to release."""


class ProcessPoolWorkers(ClientWorkers):
    """A pool of ``processes`` workers that share the run context's base model. When one is killed, all are replaced.

    The workers are forked from a process that has imported what they need, so each library is imported and held once.
    Messages are queued here and not in the executor, because a broken executor fails on cancelled futures.
    """

    def __init__(self, run_context: RunContext, processes: int, app: ClientApp = client_app) -> None:
        _require_files(run_context.count_tensors(), processes)
        run_context.share_memory()
        self._run_context, self._processes, self._app = run_context, processes, app
        self._queue: deque[tuple[str, Message, Context]] = deque()
        self._futures: dict[Future[tuple[Message, Context]], str] = {}
        self._executor, self._lifeline = self._start()

    def _start(self) -> tuple[ProcessPoolExecutor, Connection]:
        """Start the workers.

        Return them and one end of a pipe; they exit when it is closed or this process is killed.
        """
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_list_modules(self._run_context))
        watched, lifeline = context.Pipe(duplex=False)
        begin: tuple[Any, ...] = (HandedContext(self._run_context), watched, dict(os.environ))
        return ProcessPoolExecutor(self._processes, mp_context=context, initializer=_begin, initargs=begin), lifeline

    def submit(self, message_id: str, message: Message, context: Context) -> None:
        """Queue a message."""
        self._queue.append((message_id, message, context))

    def collect_results(self) -> list[tuple[str, ClientResult]]:
        """Return the replies that have arrived."""
        while self._queue and len(self._futures) <= self._processes:
            message_id, message, context = self._queue.popleft()
            self._futures[self._hand_over(message, context)] = message_id
        done, _ = wait(self._futures, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
        return [(self._futures.pop(future), _result(future)) for future in done]

    def _hand_over(self, message: Message, context: Context) -> Future[tuple[Message, Context]]:
        with start_without_interrupts():
            try:
                return self._executor.submit(_answer, self._app, message, context)
            except BrokenProcessPool:
                self.close()
                self._executor, self._lifeline = self._start()
                return self._executor.submit(_answer, self._app, message, context)

    def discard_pending(self) -> None:
        """Drop queued messages. Replies of running clients are ignored."""
        self._queue.clear()
        self._futures.clear()

    def close(self) -> None:
        """Stop the processes at once, even if they are running clients."""
        _let_go_of_half_written_messages(self._executor)
        self._lifeline.close()
        self._executor.shutdown()


def _let_go_of_half_written_messages(executor: ProcessPoolExecutor) -> None:
    """Close the parent's read end of the call queue.

    Early releases of Python 3.11 wait forever if workers exit while a message to them is being written. Later releases
    close this end themselves, so that the writer gets an error, which is ignored. Two threads must not close it at
    once, so the executor's own thread, which ends a broken pool, has time for it first.
    """
    queue: Any = vars(executor).get("_call_queue")
    thread: threading.Thread | None = vars(executor).get("_executor_manager_thread")
    if thread is not None and vars(executor).get("_broken"):
        thread.join(_END_OF_BROKEN_POOL)
    if queue is not None:
        queue._reader.close()


def _result(future: Future[tuple[Message, Context]]) -> ClientResult:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        return RuntimeError("a worker process was killed, perhaps for want of memory")
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _require_files(shared: int, processes: int) -> None:
    """Raise RunError if this process may not open a file for each tensor in shared memory, and a copy for each worker
    that is being started.
    """
    limit = raise_file_limit()
    if shared * (1 + processes) + _OWN_FILES > limit:
        raise RunError(
            f"the workers would share {shared:,} tensors, and each takes an open file, but the limit of open files is "
            f"{limit:,}; raise it (ulimit -n) or run the clients in one process (--workers 1)"
        )


def _list_modules(run_context: RunContext) -> list[str]:
    """Return this module and those that define the layers of the models."""
    contexts = (run_context, *run_context.by_device_class.values())
    layers = {type(layer).__module__ for context in contexts for layer in context.model.modules()}
    return [__name__, *sorted(layers - {"__main__"})]


def _begin(run_context: RunContext, watched: Connection, environment: Mapping[str, str]) -> None:
    """Initialise a worker process: it exits with its parent and owns copies of the tensors that it trains.

    The process that it was forked from has the environment of when it was started, which may have been another run.
    """
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    set_node_identity(_CLIENT)
    run_context.copy_writable_tensors()
    set_run_context(run_context)


def _end_with(watched: Connection) -> None:
    watched.poll(None)
    os._exit(1)


def _answer(app: ClientApp, message: Message, context: Context) -> tuple[Message, Context]:
    return app(message, context), context
