"""A process that makes recipes whole for a server: it imports torch, so that neither server nor submitter has to.

``python -m fedtune.simulation.recipe_check`` reads a recipe as one line of JSON and answers with one: the recipe with
every setting written out, or the sentence that says why it does not hold. It ends with its standard input, or after a
rest.
"""

import json
import os
import select
import sys
from typing import Any

from pydantic import ValidationError

from fedtune.errors import FedtuneError
from fedtune.recipe.schema import Recipe
from fedtune.recipe.validation_errors import explain_validation_error

__all__ = ["check_recipe", "main"]

_REST_SECONDS = 600.0
"""It holds as much memory as torch takes, and is started again when the next recipe comes."""


def main() -> None:
    """Answer until nobody asks any more."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
        while select.select([sys.stdin], [], [], _REST_SECONDS)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            print(json.dumps(check_recipe(json.loads(line))), file=answers, flush=True)


def check_recipe(told: Any) -> dict[str, Any]:
    """``recipe`` made whole, or ``refused``: why it does not hold."""
    from fedtune.simulation.resolve import resolve_recipe

    try:
        return {"recipe": resolve_recipe(Recipe.model_validate(told)).model_dump(mode="json")}
    except ValidationError as error:
        return {"refused": explain_validation_error(error, Recipe, "the recipe")}
    except FedtuneError as error:
        return {"refused": str(error)}


if __name__ == "__main__":
    main()
