"""A process checks recipes for a server, because the check imports torch, which a server has no other use for.

``python -m fedtune.server.recipe_check_child`` reads a recipe as one line of JSON and replies with one line: the recipe
with every setting written out, or the sentence that says why it is refused. It exits when its standard input ends, or
when it was idle for a while.
"""

import json
import os
import sys
from typing import Any

from pydantic import ValidationError

from fedtune.child_processes import wait_until_readable
from fedtune.errors import FedtuneError
from fedtune.recipe.schema import Recipe
from fedtune.recipe.validation_errors import explain_validation_error

__all__ = ["main", "reply_to"]

_IDLE_SECONDS = 600.0
"""It holds as much memory as torch takes, and is started again for the next recipe."""


def main() -> None:
    """Check recipes until nobody sends any more."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print to standard output, which carries replies
        while wait_until_readable(sys.stdin, _IDLE_SECONDS):
            line = sys.stdin.readline()
            if not line:
                return
            print(json.dumps(reply_to(json.loads(line))), file=replies, flush=True)


def reply_to(sent: Any) -> dict[str, Any]:
    """The checked recipe as ``recipe``, or the reason why it is refused as ``refused``."""
    from fedtune.server.recipe_check import check_recipe

    try:
        return {"recipe": check_recipe(Recipe.model_validate(sent)).model_dump(mode="json")}
    except ValidationError as error:
        return {"refused": explain_validation_error(error, Recipe, "the recipe")}
    except FedtuneError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    main()
