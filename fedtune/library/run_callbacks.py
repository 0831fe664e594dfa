"""Callbacks of a run: functions that are called with each event, and those that packages publish by name."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from fedtune.errors import RecipeError, RunError
from fedtune.recipe.plug_ins import find_plug_in, find_plug_ins
from fedtune.recipe.validation_errors import suggest_nearest
from fedtune.server.events import Event, event_handler

__all__ = ["Callback", "load_callbacks", "pass_events"]

Callback = Callable[[Event], object]
"""Called with each event of a run: RunStarted, RoundStarted, ReplyReceived, RoundEnded, and those of scoring."""

_GROUP = "fedtune.callbacks"
_WHERE = "callbacks"


def load_callbacks(callbacks: Sequence[Callback | str]) -> list[Callback]:
    """The callbacks, with those that are named imported; RecipeError for a name that no package publishes."""
    return [_load(one) if isinstance(one, str) else one for one in callbacks]


def _load(name: str) -> Callback:
    plug_in = find_plug_in(_GROUP, name, _WHERE)
    if plug_in is None:
        known = list(find_plug_ins(_GROUP))
        hint = suggest_nearest(name, known) if known else f"install a package that publishes it in the group {_GROUP}"
        raise RecipeError(f"{_WHERE}: there is no {name!r}; {hint}")
    loaded = plug_in.load(_WHERE)
    call: Callback = loaded() if isinstance(loaded, type) else loaded
    if not callable(call):
        raise RecipeError(f"{_WHERE}: {name} of the package {plug_in.package} cannot be called; update it")

    def call_safely(event: Event) -> None:
        try:
            call(event)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(
                f"the callback {name} of the package {plug_in.package} failed ({reason}); resume the run without it"
            ) from error

    return call_safely


@contextmanager
def pass_events(callbacks: Sequence[Callback], *, keep: bool = False) -> Iterator[None]:
    """Pass the events of the block to each callback in order; with ``keep`` to the present handler first."""
    present: list[Callback] = [event_handler.get()] if keep else []

    def handle(event: Event) -> None:
        for callback in (*present, *callbacks):
            callback(event)

    token = event_handler.set(handle)
    try:
        yield
    finally:
        event_handler.reset(token)
