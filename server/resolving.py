"""Recipes as they come over the network, made whole and checked as the command line does before it sends one."""

import json
import subprocess

from fedtune.child import environment, isolated
from fedtune.errors import RecipeError, ServerError
from fedtune.recipe import Recipe

__all__ = ["resolved"]

_SECONDS = 120.0


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with every technique and merge step written out; RecipeError when one of them does not hold."""
    command = isolated("server.resolve_child")
    sent = recipe.model_dump_json().encode()
    try:
        done = subprocess.run(command, input=sent, env=environment(), capture_output=True, timeout=_SECONDS, check=True)
        answer = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"checking the recipe took more than {_SECONDS:.0f} s; try again") from error
    except (subprocess.CalledProcessError, IndexError, ValueError) as error:
        raise RecipeError("the recipe cannot be checked: its settings lead to a fault; simplify it") from error
    if "error" in answer:
        raise RecipeError(f"the recipe: {answer['error']}")
    return Recipe.model_validate_json(answer["recipe"])
