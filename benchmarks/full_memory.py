"""Claim: full fine-tuning in a simulation holds at most four and a half copies of the model.

A run of three clients and two rounds, in processes of its own, once with a model of 32 million parameters, a fifth of
them an embedding, and once with one of two; the difference of their peaks, over that of the models' bytes in single
precision, is the number of copies. ``anonymous`` is memory of the processes' own; ``resident`` counts pages of mapped
files too, which the system can drop.

Run: python -m benchmarks.full_memory [--workers 1] [--millions 32]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.architecture_settings import WORDS
from benchmarks.architecture_zoo import tokenizer
from benchmarks.report import save
from fedtune.tracking import make_file_url

WIDTH = 256
RECIPE = """
version: 2
name: full-memory
task: text-classification
model: {{source: "path:{folder}/model"}}
data: {{source: "csv:{folder}/texts.csv"}}
devices: [{{count: 3}}]
train: {{techniques: full, lr: 1e-4, batch_size: 4, max_length: 16, local_steps: 2}}
federation: {{rounds: 2}}
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--millions", type=int, default=32)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        small, less = peaks(Path(temporary) / "small", 2, chosen.workers)
        large, size = peaks(Path(temporary) / "large", chosen.millions, chosen.workers)
    copies = {kind: round((large[kind] - small[kind]) / (size - less), 2) for kind in large}
    save(f"full_memory-{chosen.workers}", {"bytes": [less, size], "copies": copies, "small": small, "large": large})


def peaks(folder: Path, millions: int, workers: int) -> tuple[dict[str, int], int]:
    """Peaks in bytes over all processes of a run, and the model's bytes."""
    size = prepare(folder, millions)
    command = [sys.executable, "-m", "fedtune.cli.main", "simulate", str(folder / "recipe.yaml")]
    started = subprocess.Popen(
        [*command, "--workers", str(workers), "--store", make_file_url(folder / "runs.sqlite")],
        env={
            "PATH": "/usr/bin:/bin",
            "FEDTUNE_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
            "HOME": str(folder),
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    peak = {"anonymous": 0, "resident": 0}
    while started.poll() is None:
        for kind, held in now(psutil.Process(started.pid)).items():
            peak[kind] = max(peak[kind], held)
        time.sleep(0.02)
    if started.returncode:
        raise SystemExit(started.stderr.read() if started.stderr else "the run failed")
    return peak, size


def now(process: psutil.Process) -> dict[str, int]:
    """What a process and its children hold, pages they share counted in parts."""
    found = {"anonymous": 0, "resident": 0}
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        found["resident"] += sizes["Pss"]
        found["anonymous"] += sizes["Pss_Anon"] + sizes["Pss_Shmem"]
    return found


def prepare(folder: Path, millions: int) -> int:
    """A BERT of so many parameters, texts and a recipe; the model's bytes."""
    config = BertConfig(
        vocab_size=millions * 200_000 // WIDTH,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=4,
        num_hidden_layers=millions,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(folder / "model")
    made: PreTrainedTokenizerFast = tokenizer("Bert")
    made.save_pretrained(folder / "model")
    rows = [f"{WORDS[row % 44]} {WORDS[row * 7 % 44]} {WORDS[row // 2]},{row % 2}" for row in range(80)]
    (folder / "texts.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    return sum(4 * parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    main()
