"""Makes a recipe whole, or says why that cannot be: JSON in on standard input, JSON out.

A process of its own, since knowing every technique takes torch, which the gateway does without.
"""

import json
import sys

from fedtune.errors import FedtuneError
from fedtune.recipe import Recipe
from fedtune.training.resolve import resolve

__all__: list[str] = []


def main() -> None:
    """One recipe."""
    try:
        whole = resolve(Recipe.model_validate_json(sys.stdin.buffer.read()))
    except FedtuneError as error:
        json.dump({"error": str(error)}, sys.stdout)
    else:
        json.dump({"recipe": whole.model_dump_json()}, sys.stdout)


if __name__ == "__main__":
    main()
