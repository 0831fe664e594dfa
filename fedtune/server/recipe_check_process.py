"""The server checks recipes in a child process of its own, because the check imports torch."""

import json
import subprocess
import threading
from contextlib import suppress
from typing import Any

from fedtune.child_processes import environment, make_isolated_command, wait_until_readable
from fedtune.errors import RecipeError, ServerError
from fedtune.recipe.schema import Recipe

__all__ = ["RecipeCheckProcess"]

_TIMEOUT_SECONDS = 600.0
"""The check loads the recipe's model and data, which may have to be downloaded."""
_COMMAND = tuple(make_isolated_command("fedtune.server.recipe_check_child"))


class RecipeCheckProcess:
    """One process at a time, started when a recipe comes. It exits by itself when it was idle for a while."""

    def __init__(self, command: tuple[str, ...] = _COMMAND, timeout_seconds: float = _TIMEOUT_SECONDS) -> None:
        self._command, self._timeout_seconds = command, timeout_seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def check_recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe with every setting written out.

        Raise RecipeError if the recipe is refused, ServerError if it could not be checked.
        """
        line = recipe.model_dump_json() + "\n"
        with self._lock:
            reply = self._exchange(line) or self._exchange(line)  # twice: the process may have exited just now
            if reply is None:
                self._end()
                raise ServerError("the recipe could not be checked on the server; see its log, and try again")
        if "refused" in reply:
            raise RecipeError(str(reply["refused"]))
        return Recipe.model_validate(reply["recipe"])

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _exchange(self, line: str) -> dict[str, Any] | None:
        """Send a line and read one; None if the process is gone or takes too long."""
        process = self._start_if_needed()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            ready = wait_until_readable(process.stdout, self._timeout_seconds)
            reply: dict[str, Any] = json.loads(process.stdout.readline() if ready else "")
        except (OSError, ValueError):
            self._end()
            return None
        return reply

    def _start_if_needed(self) -> "subprocess.Popen[str]":
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
