"""A federation whose batch norms stay on its clients, small enough for every test."""

from pathlib import Path

from fedtune.models import own
from fedtune.recipe import Recipe
from fedtune.recipe_file import parse_recipe
from fedtune.simulation import resolve_recipe
from tests.own_nets import net

__all__ = ["local_norms", "text"]

_RECIPE = """
name: local-norms
task: image-classification
model: {{source: "path:{folder}/net"}}
data: {{source: "sample:digits", limit: 200, split: {{kind: equal-dirichlet, alpha: 0.3, min_examples: 20}}}}
devices: [{{count: 3}}]
train: {{techniques: [full, batch-norm-statistics: {{local: true}}], lr: 0.01, batch: 10, image: 16, steps: 3}}
federation: {{rounds: 3}}
evaluation: {{own: 0.25}}
"""


def text(folder: Path) -> str:
    """The recipe; its model, a ResNet-18 of width 4, is written to ``folder``."""
    if not (folder / "net").exists():
        (folder / "net").mkdir()
        own.save_image_model(net("resnet18", small=True, width=4), folder / "net")
    return _RECIPE.format(folder=folder)


def local_norms(folder: Path, *overrides: str) -> Recipe:
    """The recipe, resolved."""
    return resolve_recipe(parse_recipe(text(folder), "local-norms", overrides))
