"""Who runs the ClientApp of simulated nodes: this process, one client after the other, or a pool of processes.

A pool shares the base model: its storages lie in shared memory, and a worker copies only what is trained.
"""

import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import parent_process

import torch.multiprocessing
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.app import app as client_app
from fedtune.simulation.flower_private import be_node
from fedtune.training import Workshop, adopt

__all__ = ["InTurn", "Pool", "Workers"]

Answer = tuple[Message, Context] | Exception
_PATIENCE = 0.05
_CLIENT = 2


class Workers(ABC):
    """Takes messages and gives back answers, in whatever order they are done."""

    @abstractmethod
    def submit(self, number: str, message: Message, context: Context) -> None:
        """Queue a message."""

    @abstractmethod
    def finished(self) -> list[tuple[str, Answer]]:
        """Answers not yet given back; waits a moment when there is none."""

    @abstractmethod
    def forget(self) -> None:
        """Drop what is queued and whatever comes of what runs."""

    @abstractmethod
    def close(self) -> None:
        """Let go of processes."""


class InTurn(Workers):
    """One client after the other in this process and thread; each is run when its answer is asked for."""

    def __init__(self, app: ClientApp) -> None:
        self._app = app
        self._queue: deque[tuple[str, Message, Context]] = deque()

    def submit(self, number: str, message: Message, context: Context) -> None:
        """Queue a message."""
        self._queue.append((number, message, context))

    def finished(self) -> list[tuple[str, Answer]]:
        """Run the next client."""
        if not self._queue:
            return []
        number, message, context = self._queue.popleft()
        try:
            return [(number, (self._app(message, context), context))]
        except Exception as error:
            return [(number, error)]

    def forget(self) -> None:
        """Drop what is queued."""
        self._queue.clear()

    def close(self) -> None:
        """There is nothing to let go of."""


class Pool(Workers):
    """``processes`` workers that share the workshop's base model."""

    def __init__(self, shop: Workshop, processes: int) -> None:
        shop.share_memory()
        context = torch.multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin, initargs=(shop,))
        self._futures: dict[Future[tuple[Message, Context]], str] = {}

    def submit(self, number: str, message: Message, context: Context) -> None:
        """Queue a message."""
        self._futures[self._executor.submit(_answer, message, context)] = number

    def finished(self) -> list[tuple[str, Answer]]:
        """Answers that have come back."""
        done, _ = wait(self._futures, timeout=_PATIENCE, return_when=FIRST_COMPLETED)
        return [(self._futures.pop(future), _result(future)) for future in done]

    def forget(self) -> None:
        """Cancel what has not begun."""
        for future in self._futures:
            future.cancel()
        self._futures.clear()

    def close(self) -> None:
        """End the processes."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _result(future: Future[tuple[Message, Context]]) -> Answer:
    error = future.exception()
    if error is None:
        return future.result()
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _begin(shop: Workshop) -> None:
    """Make a fresh worker process ready: it ends with its parent and owns what it trains."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    be_node(_CLIENT)
    shop.own_trained()
    adopt(shop)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer(message: Message, context: Context) -> tuple[Message, Context]:
    return client_app(message, context), context
