"""Features of Fashion-MNIST by EfficientNet-Lite0 as pretrained on ImageNet, kept in the cache."""

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fedtune import tasks
from fedtune.continual._head_features import iter_features
from fedtune.paths import get_cache_folder
from fedtune.recipe.schema import Recipe
from fedtune.training import prepare_model

CLASSES = 10
Part = tuple[Tensor, Tensor]
"""Features [n, d] and labels [n]."""
Parts = dict[str, Part]


def make_recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "continual-classes",
            "task": "image-classification",
            "model": {"source": "sample:efficientnet-lite0"},
            "data": {"source": "sample:fashion-mnist"},
            "devices": [{"count": 1}],
            "train": {"techniques": ["head-only"], "image_size": 64, "local_epochs": 1},
            "federation": {"rounds": 1},
        }
    )


def read_features(sizes: dict[str, int]) -> Parts:
    """The features of the first pictures of each class in each part; they are computed once and kept in the cache."""
    return {name: read_part(name, count) for name, count in sizes.items()}


def read_part(name: str, count: int) -> Part:
    path = get_cache_folder() / "benchmarks" / f"lite0-fashion-{name}-{count}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        features, labels = compute_features(name, count)
        safetensors.torch.save_file({"features": features, "labels": labels}, path)
    kept = safetensors.torch.load_file(path)
    return kept["features"], kept["labels"]


def compute_features(name: str, count: int) -> Part:
    recipe = make_recipe()
    corpus = tasks.load_data(recipe, tasks.load_class_names(recipe))
    model, chosen, _ = prepare_model(recipe, corpus.label_names)
    table, reader = getattr(corpus, name), tasks.load_reader(recipe)
    labels = np.array(table["label"])
    rows = np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(CLASSES)]))
    examples = tasks.get_task(recipe.task).encode_examples(table.select(rows), recipe, reader)
    features, found = zip(*iter_features(model, chosen, examples, range(len(rows)), 50), strict=True)
    return torch.cat(features), torch.cat(found)
