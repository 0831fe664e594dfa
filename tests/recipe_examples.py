"""A recipe with something of everything, and the sentence a broken one is refused with."""

import pytest

from fedtune.errors import RecipeError
from fedtune.recipe.yaml_file import parse_recipe

__all__ = ["TEXT", "refusal"]

TEXT = """\
name: example
task: text-classification
model:
  source: path:nowhere
data:
  source: sample:sentiment
  split: {kind: dirichlet, alpha: 0.5}
devices:
  - {name: phone, count: 3, memory: 512MB}
  - {name: laptop, count: 2, memory: 2GiB}
train:
  techniques:
    - lora: {rank: 4}
    - gradient-checkpointing
  steps: 2
federation:
  rounds: 3
"""


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "a.yaml", overrides)
    return str(caught.value)
