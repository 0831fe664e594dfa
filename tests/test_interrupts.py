"""Ctrl-C waits for the end of what must not be left half done, also where other threads could take the signal."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from pydantic import model_serializer
from sqlalchemy import Connection, Engine, text

from fedtune.interrupts import hold_interrupts, start_without_interrupts
from fedtune.recipe.settings_model import SettingsModel
from fedtune.tracking.database import make_engine, make_file_url, reader, writer

_CHILD = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"


def interrupt() -> None:
    """As a terminal does it: the signal goes to the process, and any thread may take it."""
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # Python raises between two instructions
        pass


@pytest.mark.parametrize("hold", [hold_interrupts, start_without_interrupts])
def test_ctrl_c_waits_for_the_end_of_the_block(hold: Callable[[], AbstractContextManager[None]]) -> None:
    done: list[str] = []
    idle = threading.Event()
    other = threading.Thread(target=idle.wait)
    other.start()

    def interrupt_twice() -> None:
        with hold():
            interrupt()
            with hold():
                interrupt()
                done.append("inner")
            done.append("outer")

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_twice()
    finally:
        idle.set()
        other.join()
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_thread_needs_no_delay() -> None:
    found = []

    def enter() -> None:
        with hold_interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_processes_started_inside_leave_ctrl_c_to_their_parent() -> None:
    with start_without_interrupts():
        told = subprocess.run([sys.executable, "-c", _CHILD], check=True, capture_output=True, text=True).stdout
    assert told.strip() == "True"


def test_an_interrupted_transaction_is_whole_and_leaves_the_database_free(tmp_path: Path) -> None:
    engine = make_engine(make_file_url(tmp_path / "store.sqlite") + "?timeout=1")
    with writer(engine) as connection:
        connection.execute(text("create table numbers (number integer)"))

    def interrupt_transaction(kind: Callable[[Engine], AbstractContextManager[Connection]]) -> None:
        with kind(engine) as connection:
            connection.execute(text("select * from numbers")).fetchall()
            interrupt()
            if kind is writer:
                connection.execute(text("insert into numbers values (1)"))

    for kind in (writer, reader):
        with pytest.raises(KeyboardInterrupt) as interrupted:
            interrupt_transaction(kind)
        with writer(engine) as connection:
            connection.execute(text("insert into numbers values (2)"))
        del interrupted  # only now, as while the end of a run is recorded
    with reader(engine) as connection:
        assert connection.execute(text("select number from numbers")).scalars().all() == [1, 2, 2]
    engine.dispose()


@pytest.mark.parametrize("write", [SettingsModel.model_dump, SettingsModel.model_dump_json])
def test_ctrl_c_is_no_error_of_a_recipe_that_is_written(write: Callable[[SettingsModel], object]) -> None:
    class Interrupted(SettingsModel):
        value: int = 1

        @model_serializer
        def serialise(self) -> dict[str, int]:
            interrupt()
            return {"value": self.value}

    with pytest.raises(KeyboardInterrupt):
        write(Interrupted())
