"""Recipes made whole in a process of its own, since that takes torch, which a server has no other use for."""

import json
import select
import subprocess
import threading
from contextlib import suppress
from typing import Any

from fedtune.child_processes import environment, make_isolated_command
from fedtune.errors import RecipeError, ServerError
from fedtune.recipe.schema import Recipe

__all__ = ["RecipeCheck"]

_PATIENCE = 120.0
_COMMAND = tuple(make_isolated_command("fedtune.simulation.recipe_check"))


class RecipeCheck:
    """One process at a time, started when a recipe comes; it ends by itself after a rest."""

    def __init__(self, command: tuple[str, ...] = _COMMAND, patience: float = _PATIENCE) -> None:
        self._command, self._patience = command, patience
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def whole(self, recipe: Recipe) -> Recipe:
        """The recipe with techniques and merge steps checked and every setting of theirs written out.

        RecipeError for one that does not hold, ServerError when that cannot be found out.
        """
        line = recipe.model_dump_json() + "\n"
        with self._lock:
            told = self._exchange(line) or self._exchange(line)  # once more: it may have gone to rest just now
            if told is None:
                self._end()
                raise ServerError("the recipe could not be checked on the server; see its log, and try again")
        if "refused" in told:
            raise RecipeError(str(told["refused"]))
        return Recipe.model_validate(told["recipe"])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _exchange(self, line: str) -> dict[str, Any] | None:
        """A line there and one back; None when the process is gone, or takes too long."""
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            ready = select.select([process.stdout], [], [], self._patience)[0]
            answer = process.stdout.readline() if ready else ""
            told: dict[str, Any] = json.loads(answer)
        except (OSError, ValueError):
            self._end()
            return None
        return told

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                self._command,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        return self._process

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._process = None
