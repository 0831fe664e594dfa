"""Full fine-tuning holds the model, its gradients and two moments, and no further copy of the model."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import re, sys, threading, time
from pathlib import Path

from tests.federations import execute, tiny_bert, words
from fedtune.training import clear_run_context

SETTINGS = ("train.techniques=[full]", "train.lr_schedule=constant", "train.local_steps=1", "devices=[{count: 2}]")

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

def watch():
    while not over.is_set():
        peaks.append(anonymous())
        time.sleep(0.003)

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    execute(words(folder / "small", *SETTINGS), run="small")  # imports what a run needs
    recipe = words(folder / "wide", *SETTINGS)
    tiny_bert(folder / "wide" / "bert", 1024)
    clear_run_context()
    base, peaks, over = anonymous(), [], threading.Event()
    watching = threading.Thread(target=watch)
    watching.start()
    execute(recipe, run="wide")
    over.set()
    watching.join()
    size = (folder / "wide" / "bert" / "model.safetensors").stat().st_size
    print((max(peaks) - base) / size)
"""


@pytest.mark.deployed
def test_full_fine_tuning_holds_four_copies_of_the_model_and_half_a_one(tmp_path: Path) -> None:
    copies = [measured(tmp_path / "once")]
    if copies[0] >= 4.5:  # what the allocator holds on to varies by a tenth of the model from run to run
        copies.append(measured(tmp_path / "again"))
    assert 3.9 < min(copies) < 4.5  # weights, gradients, two moments; merge and payloads never hold as much


def measured(folder: Path) -> float:
    """Peak anonymous memory of a run over what was held before, as a multiple of the model."""
    folder.mkdir()
    script = folder / "measure.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        env={
            "PYTHONPATH": str(Path(__file__).parents[1]),
            "FEDTUNE_HOME": str(folder / "home"),
            "PATH": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])
