"""Claim: on a stream of four sentiment domains x two questions, a method without stored data closes most of the gap.

Sentences of tweets, film reviews, product reviews and editorials (``sample:sentiment``). One question is whether a
sentence is positive, the other whether its rating is strong: in the upper third of its domain by size, against the
lower third. Each sentence is asked one question, which stands before it, so the eight tasks share no sentence. MiniLM
learns with low-rank pairs on two clients; a seed draws the order of the tasks, splits, and weights.

``class``: each task brings two labels of its own, such as "movies positive", and all 16 compete. ``domain``: all tasks
have the labels yes and no. The gap is that between naive and joint training, in the mean accuracy on the test parts of
all tasks after the last one. ``joint`` has as many steps as the stream. No arm but joint has any example of earlier
tasks. Test parts have about 24 sentences a task: the sampling error of a run is 3 to 4 points.

Run: python -m benchmarks.continual_sentiment [--seeds 3] [--settings class domain] [--short]
"""

import argparse
import csv
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.stream_arms import RATES, Stream, compare_arms
from fedtune.data import sentiment_samples
from fedtune.training import use_cpu_threads

DOMAINS = ("tweets", "movies", "products", "editorials")
QUESTIONS = {"positive": ("positive", "negative"), "strong": ("strong", "weak")}
"""The labels of yes and no."""
EACH, STEPS = 80, 8
"""Sentences of each label of a task, and the steps of a client in a round."""
RECIPE = """
version: 2
name: sentiment
seed: {seed}
task: text-classification
model: {{source: "sample:minilm"}}
data:
  source: "csv:{folder}/sentences.csv"
  columns: {{text: text, label: {label}, group: group, domain: task}}
  splits: {{validation: 0.1, test: 0.15}}
  partition: {{kind: iid}}
devices: [{{name: phone, count: 2, memory: 1GB}}]
train: {{optimiser: adamw, weight_decay: 0, lr_schedule: linear, batch_size: 8, max_length: 32,
  group_by_length: true, local_steps: {steps}, techniques: [{{lora: {{trained_factors: b-only}}}}]}}
evaluation: {{every_n_rounds: 1000, batch_size: 32}}
stream: {{setting: {setting}, {tasks}}}
"""
TUNED_FIRST = ("stream.memory=[{analytic: {tune: first, fewest: 1}}]",)
ARMS: dict[str, dict[str, Sequence[str]]] = {
    "class": {
        "naive": (),
        "joint": ("stream.memory=[joint]",),
        "naive, loss new": ("stream.loss=new",),
        "analytic, first task tuned": TUNED_FIRST,
    },
    "domain": {
        "naive": (),
        "joint": ("stream.memory=[joint]",),
        "analytic, first task tuned": TUNED_FIRST,
        "average": ("stream.consolidate=[average]",),
    },
}
"""What differs from the recipe."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--short", action="store_true", help="one step a round, one rate, to try the script")
    given = parser.parse_args()
    steps, rates = (1, RATES[:1]) if given.short else (STEPS, RATES)
    with use_cpu_threads(1), TemporaryDirectory() as folder:
        write_sentences(Path(folder, "sentences.csv"))
        streams = [
            Stream(setting, partial(write_recipe, folder=folder, setting=setting, steps=steps), ARMS[setting])
            for setting in given.settings
        ]
        name = "continual_sentiment-short" if given.short else "continual_sentiment"
        compare_arms(name, streams, given.seeds, rates)


def write_recipe(seed: int, folder: str, setting: str, steps: int) -> str:
    """Return the recipe with the tasks in the order of a seed, two rounds each."""
    names = [(domain, question) for domain in DOMAINS for question in QUESTIONS]
    visits = []
    for number in np.random.default_rng(seed).permutation(len(names)):
        domain, question = names[number]
        where = [f"{domain} {label}" for label in QUESTIONS[question]] if setting == "class" else []
        visits.append(f"{{name: {domain} {question}, rounds: 2" + (f", where: {where}}}" if where else "}"))
    label = "class" if setting == "class" else "answer"
    tasks = f"by: {'label' if setting == 'class' else 'domain'}, tasks: [{', '.join(visits)}]"
    return RECIPE.format(seed=seed, folder=folder, label=label, setting=setting, steps=steps, tasks=tasks)


def write_sentences(path: Path) -> Path:
    """Write ``EACH`` sentences of each label of each task; which ones is decided by their digests."""
    table = sentiment_samples.sentiment()["train"]
    columns = [table[name] for name in ("text", "rating", "group", "domain")]
    rows = [dict(zip(("text", "rating", "group", "domain"), row, strict=True)) for row in zip(*columns, strict=True)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "class", "answer", "task", "group"])
        for domain in DOMAINS:
            own = sorted((row for row in rows if row["domain"] == domain), key=hash_sentence)
            halves = {"positive": own[::2], "strong": own[1::2]}
            for question, answers in make_answers(own).items():
                writer.writerows(list_sentences(halves[question], domain, question, answers))
    return path


def make_answers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[float], str | None]]:
    """Return, by question, what answers it from a domain's rating; None where a rating is between yes and no."""
    lower, upper = np.quantile([abs(row["rating"]) for row in rows], [1 / 3, 2 / 3])

    def is_strong(rating: float) -> str | None:
        return "yes" if abs(rating) >= upper else "no" if abs(rating) <= lower else None

    return {"positive": lambda rating: "yes" if rating > 0 else "no", "strong": is_strong}


def list_sentences(
    rows: Sequence[Mapping[str, Any]], domain: str, question: str, answer: Callable[[float], str | None]
) -> list[list[str]]:
    """Return the lines of a task's first ``EACH`` sentences for yes and for no."""
    found = []
    for wanted, label in zip(("yes", "no"), QUESTIONS[question], strict=True):
        own = [row for row in rows if answer(row["rating"]) == wanted][:EACH]
        found += [
            [f"{question}? {row['text']}", f"{domain} {label}", wanted, f"{domain} {question}", row["group"]]
            for row in own
        ]
    return found


def hash_sentence(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(row["text"].encode()).hexdigest()


if __name__ == "__main__":
    main()
