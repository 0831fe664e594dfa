"""Claim: on a stream of eight text tasks with low-rank pairs, a method without stored data closes most of the gap.

WordNet's noun categories come three at a time; MiniLM learns to name the category of a definition, of about 70
definitions per category, so that the benchmark takes an hour on one core. The gap is that between naive and joint
training, in the mean accuracy on the test parts of all tasks after the last one. ``joint`` has as many steps as the
stream. ``replay`` stores five percent of its examples, all other arms store nothing. A seed draws the order of the
tasks, splits, and weights. The test parts have about 480 definitions: the sampling error of a run is 2 points.

Run: python -m benchmarks.continual_text [--seeds 3] [--arms NAME ...] [--short]
"""

import argparse
from collections.abc import Sequence
from functools import partial

from benchmarks.stream_arms import RATES, Stream, compare_arms
from fedtune.training import use_cpu_threads

STEPS = 12
RECIPE = """
version: 2
name: nouns
seed: {seed}
task: text-classification
model: {{source: "sample:minilm"}}
data:
  source: sample:wordnet-nouns
  columns: {{text: text, label: label, group: group}}
  splits: {{validation: 0.05, test: 0.05}}
  partition: {{kind: iid}}
  max_train_examples: 1680
devices: [{{name: phone, count: 2, memory: 1GB}}]
train: {{optimiser: adamw, weight_decay: 0, lr_schedule: linear, batch_size: 16, max_length: 32,
  group_by_length: true, local_steps: {steps}, techniques: [{{lora: {{trained_factors: b-only}}}}]}}
evaluation: {{every_n_rounds: 1000, batch_size: 32}}
stream: {{setting: class, tasks: {{size: 3, rounds: 2, order: seed}}}}
"""
ARMS: dict[str, Sequence[str]] = {
    "naive": (),
    "joint": ("stream.memory=[joint]",),
    "analytic, frozen": ("stream.memory=[analytic]", "train.techniques=[head-only]"),
    "analytic, first task tuned": ("stream.memory=[{analytic: {tune: first}}]",),
    "replay": ("stream.memory=[replay]",),
    "inf-lora, loss new": ("stream.loss=new", "train.techniques=[inf-lora]", "stream.memory=[dual-gpm]"),
}
"""What differs from the recipe."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--short", action="store_true", help="one step a round, one rate, to try the script")
    given = parser.parse_args()
    steps = 1 if given.short else STEPS
    stream = Stream("nouns", partial(write_recipe, steps=steps), {name: ARMS[name] for name in given.arms})
    with use_cpu_threads(1):
        name = "continual_text-short" if given.short else "continual_text"
        compare_arms(name, [stream], given.seeds, RATES[:1] if given.short else RATES)


def write_recipe(seed: int, steps: int) -> str:
    """Return the recipe of a seed."""
    return RECIPE.format(seed=seed, steps=steps)


if __name__ == "__main__":
    main()
