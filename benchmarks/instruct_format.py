"""How often replies to held-out prompts have the format of the data, before and after recipes/instruct.yaml.

The model is trained by the recipe (or a finished run is taken), exported as an adapter and loaded by PEFT on the plain
base. Both models reply greedily to every conversation of the test split, which nothing was trained on. A reply has the
format of the data if it

- is not empty and the model ends it itself, within 64 tokens,
- is one line,
- has no markup: no heading, list, bold text or code,
- has at most as many words as 95 of 100 replies of the training split.

Nothing in the check depends on what the models write. Also printed: the loss on the answers of the test split.

Run: python -m benchmarks.instruct_format [--run RUN] [--recipe FILE] [--limit N]
"""

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedtune
from benchmarks import report
from fedtune import tasks
from fedtune.data import Table
from fedtune.data.encoded_prompts import encode_chat_prompts
from fedtune.library.recorded_run import Run
from fedtune.models.sources import resolve_model_source
from fedtune.recipe.evaluation_settings import GenerationSettings
from fedtune.training.generation import GeneratedText, TextGenerator

MARKUP = re.compile(r"^\s*(#+ |[-*+] |\d+[.)] )|\*\*|`")
TOKENS, BATCH = 64, 16


def has_format(reply: GeneratedText, most_words: int) -> bool:
    """Whether a reply is written as those of the data are."""
    text = reply.text.strip()
    whole = reply.ended and bool(text) and "\n" not in text
    return whole and not MARKUP.search(text) and len(text.split()) <= most_words


def find_most_words(examples: Table) -> int:
    """The number of words that 95 of 100 last replies do not exceed."""
    words = [len(messages[-1]["content"].split()) for messages in examples["messages"]]
    return int(np.percentile(words, 95))


def reply_to(model: Any, recipe: fedtune.Recipe, prompts: Sequence[Any]) -> list[GeneratedText]:
    reader = tasks.load_reader(recipe)
    settings = GenerationSettings(max_new_tokens=TOKENS)
    return TextGenerator(model.eval(), (), reader, settings, BATCH).generate_texts(encode_chat_prompts(reader, prompts))


def count(replies: Sequence[GeneratedText], most_words: int) -> dict[str, Any]:
    fitting = sum(has_format(reply, most_words) for reply in replies)
    ended = sum(reply.ended for reply in replies)
    words = sorted(len(reply.text.split()) for reply in replies)
    return {"in_format": fitting, "n": len(replies), "ended": ended, "median_words": words[len(words) // 2]}


def read_losses(run: Run) -> dict[str, float]:
    """The loss on the answers of the test split, before and after training."""
    rows = run.metrics.to_pylist()
    splits = {"test-before": "before", "test": "after"}
    return {
        splits[row["split"]]: row["value"]
        for row in rows
        if row["split"] in splits and row["domain"] == "all" and row["name"] == "loss"
    }


def measure(run: Run, limit: int | None) -> dict[str, Any]:
    recipe = run.recipe
    corpus = tasks.load_data(recipe)
    most_words = find_most_words(corpus.train)
    prompts = [list(messages[:-1]) for messages in corpus.test["messages"]][:limit]
    base = resolve_model_source(recipe.model.source)
    with tempfile.TemporaryDirectory() as made:
        folder = run.export(Path(made) / "adapter", form="adapter")
        before = reply_to(AutoModelForCausalLM.from_pretrained(base), recipe, prompts)
        plain = AutoModelForCausalLM.from_pretrained(base)
        after = reply_to(PeftModel.from_pretrained(plain, str(folder)).merge_and_unload(), recipe, prompts)
    examples = [
        {"prompt": prompt[-1]["content"], "before": one.text, "after": other.text}
        for prompt, one, other in list(zip(prompts, before, after, strict=True))[:8]
    ]
    return {
        "run": run.id,
        "most_words": most_words,
        "wanted_replies": count(
            [GeneratedText(one[-1]["content"], True) for one in corpus.test["messages"]], most_words
        ),
        "before": count(before, most_words),
        "after": count(after, most_words),
        "test_loss": read_losses(run),
        "examples": examples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", help="a finished run; otherwise the recipe is run")
    parser.add_argument("--recipe", default="recipes/instruct.yaml")
    parser.add_argument("--limit", type=int, help="number of prompts; default: the whole test split")
    parser.add_argument("--name", default="instruct_format", help="name of the file of results")
    chosen = parser.parse_args()
    run = fedtune.runs()[chosen.run] if chosen.run else fedtune.simulate(chosen.recipe)
    report.save(chosen.name, measure(run, chosen.limit))


if __name__ == "__main__":
    main()
