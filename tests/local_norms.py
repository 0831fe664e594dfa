"""A federation whose batch norms stay on its clients, small enough for every test."""

from pathlib import Path

from fedtune.models import image_model_files
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.simulation import resolve_recipe
from tests.own_nets import net

__all__ = ["local_norms", "text"]

_RECIPE = """
version: 2
name: local-norms
task: image-classification
model: {{source: "path:{folder}/net"}}
data: {{source: "sample:digits", max_train_examples: 200, partition: {{kind: equal-dirichlet, alpha: 0.3,
  min_examples: 20}}}}
devices: [{{count: 3}}]
train: {{techniques: [full, batch-norm-statistics: {{local: true}}], lr: 0.01, batch_size: 10,
  image_size: 16, local_steps: 3}}
federation: {{rounds: 3}}
evaluation: {{local_holdout: 0.25}}
"""


def text(folder: Path) -> str:
    """The recipe; its model, a ResNet-18 of width 4, is written to ``folder``."""
    if not (folder / "net").exists():
        (folder / "net").mkdir()
        image_model_files.save_image_model(net("resnet18", small=True, width=4), folder / "net")
    return _RECIPE.format(folder=folder)


def local_norms(folder: Path, *overrides: str) -> Recipe:
    """The recipe, resolved."""
    return resolve_recipe(parse_recipe(text(folder), "local-norms", overrides))
