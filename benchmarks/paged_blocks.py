"""A step of SmolLM2 whose matrices stay in a file, as a device's trainer takes it: plain blocks against transformers.

One text of 256 random tokens, one thread, each case in a fresh process that imports what a trainer imports, fixes the
allocator's threshold and takes two steps (forward, backward, AdamW of the product). ``anonymous_bytes`` and
``resident_bytes`` are the process's peaks from its start, ``torch_bytes`` the anonymous memory after ``import torch``,
``idle_bytes`` that of the loaded model, waiting, and ``seconds`` the processor time of the second step. ``digest`` is
one of all gradients of the second step: equal digests are equal bits.

Run: python -m benchmarks.paged_blocks
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from fedtune.memory.allocator import fix_mmap_threshold
from fedtune.memory.heap import release_freed
from fedtune.memory.process_memory import MemoryWatch, peak_rss, read_resident_memory

LORA = "lora+gradient-checkpointing+fused-cross-entropy"
CASES: tuple[tuple[str | bool, str, bool], ...] = (
    ("bf16", LORA, False),
    ("bf16", LORA, True),
    (True, LORA, True),
)


def main() -> None:
    from benchmarks.report import save

    save("paged-blocks", {"tokens": 256, "rows": list(run_cases())})


def run_cases() -> Iterator[dict[str, Any]]:
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.paged_blocks", "--case", json.dumps(case)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ)
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        print(row, file=sys.stderr, flush=True)
        yield row


def measure(paged: str | bool, method: str, blocks: bool) -> dict[str, Any]:
    """Take two steps and measure the second. The store is in the cache, or is made before the peak is watched."""
    allocator = fix_mmap_threshold()
    bare = read_resident_memory()
    import fedtune.device.trainer  # noqa: F401 - what a trainer imports
    from benchmarks.paged import TASK, count_reads, hash_gradients, make_text
    from fedtune import models, techniques
    from fedtune.models.blocks.preference import prefer_plain_blocks
    from fedtune.models.paging.paged_matrix import release_buffers
    from fedtune.recipe.schema import ModelSettings, Train, Unit
    from fedtune.training import set_train_mode, use_cpu_threads
    from fedtune.training.optimisers import make_optimiser

    if blocks:
        prefer_plain_blocks()
    settings = ModelSettings.model_validate({"source": "sample:smollm2", "paged": paged})
    chosen = techniques.build_techniques([Unit(name=name) for name in method.split("+")])
    with MemoryWatch() as watch, use_cpu_threads(1):
        model = models.load_model(settings, TASK, (), seed=0)
        techniques.apply_techniques(chosen, model, TASK, 0)
        techniques.begin_round(chosen, model, 1)
        release_buffers()
        release_freed()
        idle = read_resident_memory()
        set_train_mode(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = make_optimiser(Train(techniques=[Unit(name="lora")], local_steps=2), trained)
        batch = make_text(model)
        for _ in range(2):
            before, start = count_reads(model), time.process_time()
            torch.manual_seed(1)
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimiser.step(1e-3)
            seconds = time.process_time() - start
    return {
        "paged": paged,
        "techniques": method,
        "blocks": blocks,
        "torch_bytes": bare and bare.anonymous,
        "idle_bytes": idle and idle.anonymous,
        "anonymous_bytes": watch.anonymous,
        "resident_bytes": peak_rss(),
        "seconds": round(seconds, 2),
        "read_bytes": count_reads(model) - before,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "loss": float(loss.detach()),
        "digest": hash_gradients(model),
        "imports_transformers": "transformers" in sys.modules,
        "allocator": allocator,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main()
