"""Claim: on a class stream with a tuned backbone, a method without stored data closes 70 % of the gap, replay 85 %.

Fashion-MNIST, two classes at a time, at 32 pixels: the last block of EfficientNet-Lite0, as pretrained on ImageNet, and
a new head are trained. Of each class, a seed draws 160 training, 20 validation and 60 test pictures, the order of
the tasks, and weights. The gap is that between naive and joint training, in the mean accuracy on the test parts of all
tasks after the last one. ``joint`` has as many steps as the stream. ``replay`` stores five percent of its examples on
two devices, all other arms store nothing. The sampling error of a run is 1.5 points.

Run: python -m benchmarks.continual_images [--seeds 3] [--arms NAME ...] [--short]
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from benchmarks.stream_arms import RATES, Stream, compare_arms
from fedtune.data.image_samples import fashion_mnist
from fedtune.training import use_cpu_threads

PICTURES, STEPS = 240, 15
RECIPE = """
version: 2
name: clothes
seed: {seed}
task: image-classification
model: {{source: "sample:efficientnet-lite0"}}
data:
  source: "folder:{folder}"
  splits: {{validation: 0.0834, test: 0.25}}
  partition: {{kind: equal-dirichlet, alpha: 1.0}}
devices: [{{name: camera, count: 2, memory: 1GB}}]
train: {{optimiser: adamw, weight_decay: 0, lr_schedule: linear, batch_size: 16, image_size: 32, local_steps: {steps},
  techniques: [{{last-blocks: {{num_blocks: 1, norm_statistics: frozen}}}}]}}
evaluation: {{every_n_rounds: 1000, batch_size: 50}}
stream: {{setting: class, tasks: {{size: 2, rounds: 3, order: seed}}}}
"""
ARMS: dict[str, Sequence[str]] = {
    "naive": (),
    "joint": ("stream.memory=[joint]",),
    "analytic, frozen": ("stream.memory=[analytic]", "train.techniques=[head-only]"),
    "analytic, first task tuned": ("stream.memory=[{analytic: {tune: first}}]",),
    "replay": ("stream.memory=[replay]",),
}
"""What differs from the recipe."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--short", action="store_true", help="one step a round, one rate, to try the script")
    given = parser.parse_args()
    steps, rates = (1, RATES[:1]) if given.short else (STEPS, RATES)
    with use_cpu_threads(1), TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        stream = Stream(
            "clothes", partial(write_recipe, folder=folder, steps=steps), {name: ARMS[name] for name in given.arms}
        )
        name = "continual_images-short" if given.short else "continual_images"
        compare_arms(name, [stream], given.seeds, rates)


def write_pictures(folder: Path) -> None:
    """Write the first ``PICTURES`` training pictures of each class, in a folder per class."""
    table = fashion_mnist()["train"]
    labels = np.asarray(table["label"][:])
    for label in np.unique(labels):
        own = folder / f"class-{label}"
        own.mkdir()
        for row in np.flatnonzero(labels == label)[:PICTURES]:
            picture = table["image"][int(row)]
            found = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture, np.uint8))
            found.save(own / f"{row}.png")


def write_recipe(seed: int, folder: str, steps: int) -> str:
    """Return the recipe of a seed."""
    return RECIPE.format(seed=seed, folder=folder, steps=steps)


if __name__ == "__main__":
    main()
