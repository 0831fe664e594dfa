"""Claim: with ``data.tokens: disk``, 5 GB of text train under 300 MB of memory for data, and start again in 10 seconds.

Each start is a process of its own: it loads the recipe's data, encodes the training part and draws batches from all of
it. ``seconds`` is the time until the first batch. ``anonymous_mb`` is what the process holds beyond files that the
kernel may drop at any time, and ``resident_mb`` its peak with them; both beyond what it held before it read the data.

Run: python -m benchmarks.large_text [--gigabytes N]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.report import save
from fedtune import tasks
from fedtune.memory import peak_rss, reset_peak_rss
from fedtune.recipe.schema import Recipe

WORDS = 20_000
BATCHES, BATCH = 200, 16
RECIPE = """{{"version": 2, "name": "large", "task": "text-generation", "model": {{"source": "sample:smollm2"}},
"data": {{"source": "jsonl:{file}", "tokens": "{tokens}"}}, "devices": [{{"name": "pc", "count": 1}}],
"train": {{"techniques": ["full"], "max_length": 256, "local_steps": 1}}, "federation": {{"rounds": 1}}}}"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--start", nargs=2, metavar=("FILE", "TOKENS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.start:
        print(json.dumps(start(*given.start)))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("FEDTUNE_HOME")) as folder:
        file = Path(folder) / "texts.jsonl"
        write_texts(file, int(given.gigabytes * 1e9))
        starts = [("disk", "first"), ("disk", "second")]
        starts += [("memory", "in memory")] if given.gigabytes <= 1 else []
        rows = [{"start": name, **measure(file, tokens, Path(folder))} for tokens, name in starts]
        save("large_text", {"gigabytes": file.stat().st_size / 1e9, "rows": rows})


def write_texts(file: Path, size: int) -> None:
    """Lines of 20 to 400 words drawn as in natural text: the n-th as often as 1 / n."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(WORDS)]
    weights = np.cumsum(1 / np.arange(1, WORDS + 1)).tolist()
    written = 0
    with file.open("w", encoding="utf-8") as lines:
        while written < size:
            text = " ".join(draw.choices(words, cum_weights=weights, k=draw.randint(20, 400)))
            written += lines.write(json.dumps({"text": text}) + "\n")


def measure(file: Path, tokens: str, folder: Path) -> dict[str, Any]:
    """What a start in a process of its own measures; the cache is that of the benchmark."""
    environment = {**os.environ, "FEDTUNE_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "benchmarks.large_text", "--start", str(file), tokens]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    print(found, file=sys.stderr, flush=True)
    return found


def start(file: str, tokens: str) -> dict[str, float]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    recipe = Recipe.model_validate_json(RECIPE.format(file=file, tokens=tokens))
    reader = tasks.load_reader(recipe)
    import fedtune.data.loaded  # noqa: F401  # what it takes to read any jsonl file

    reset_peak_rss()
    before, anonymous, began = psutil.Process().memory_info().rss, anonymous_bytes(), time.perf_counter()
    corpus = tasks.load_data(recipe)
    train = tasks.encode_examples(corpus.train, recipe, reader)
    train.make_batch(range(BATCH))
    seconds = time.perf_counter() - began
    rows = np.random.default_rng(0)
    for _ in range(BATCHES):
        train.make_batch(rows.integers(len(train), size=BATCH).tolist())
    return {
        "texts": len(train),
        "seconds": seconds,
        "anonymous_mb": (anonymous_bytes() - anonymous) / 1e6,
        "resident_mb": (peak_rss() - before) / 1e6,
    }


def anonymous_bytes() -> int:
    """Resident bytes that no file stands behind (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    main()
