"""A step of a language model whose matrices stay in a file (``model.paged``), against the same model in memory.

One text of 256 random tokens, one thread, glibc's mmap threshold fixed as on a device, each case in a fresh process. A
step is forward, backward and AdamW. The first step is warm-up; ``seconds`` is the processor time of the second,
``anonymous_bytes`` and ``resident_bytes`` are the process's peaks from its start, libraries included, and
``runtime_bytes`` the anonymous memory once the libraries are loaded, before the model. ``read_bytes`` is what the
second step asks the store for. ``digest`` is one of all gradients of the second step: equal digests are equal bits.

SmolLM2 is the sample, whose GGUF blocks are paged as they are. The larger shapes have random bfloat16 weights, which
this script makes in a temporary folder and deletes.

Run: python -m benchmarks.paged [smollm2 | 0.5b | 1.1b | 3.2b ...]
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.report import save
from fedtune import models, techniques
from fedtune.memory.allocator import fix_mmap_threshold
from fedtune.memory.process_memory import MemoryWatch, peak_rss, read_resident_memory
from fedtune.models.paging.paged_layers import list_paged_layers
from fedtune.recipe.schema import ModelSettings, Unit
from fedtune.tasks import get_task
from fedtune.training import set_train_mode, use_cpu_threads

TOKENS = 256
TASK = get_task("text-generation")
METHODS = ("lora+gradient-checkpointing+fused-cross-entropy", "meft+fused-cross-entropy")
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": {"layers": 24, "width": 896, "inner": 4864, "heads": 14, "kv_heads": 2, "words": 151_936, "tied": True},
    "1.1b": {"layers": 22, "width": 2048, "inner": 5632, "heads": 32, "kv_heads": 4, "words": 32_000, "tied": False},
    "3.2b": {"layers": 28, "width": 3072, "inner": 8192, "heads": 24, "kv_heads": 8, "words": 128_256, "tied": True},
}


def main() -> None:
    chosen = sys.argv[1:] or ["smollm2", "0.5b", "1.1b"]
    for name in chosen:
        save(f"paged-{name}", {"tokens": TOKENS, "rows": list(run_cases(name))})


def run_cases(name: str) -> Iterator[dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(prefix="paged-"))
    try:
        source = "sample:smollm2" if name == "smollm2" else f"path:{make_random_model(folder / name, **SHAPES[name])}"
        cases: list[tuple[bool | str, str]] = [(paged, one) for one in METHODS for paged in (False, True, "bf16")]
        if name != "smollm2":
            cases = [(paged, one) for one in METHODS for paged in (False, True)]
        for paged, method in cases:
            yield run_in_fresh_process(source, paged, method, folder if name != "smollm2" else None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_in_fresh_process(source: str, paged: bool | str, method: str, cache: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.paged", "--case", json.dumps([source, paged, method])]
    cached = {} if cache is None else {"FEDTUNE_CACHE": str(cache / "cache")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **cached})
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(row, file=sys.stderr, flush=True)
    return row


def measure(source: str, paged: bool | str, method: str) -> dict[str, Any]:
    """Take two steps and measure the second; a store is made before, in a process of its own."""
    settings = ModelSettings.model_validate({"source": source, "paged": paged})
    if paged:
        command = "import json, sys; from benchmarks.paged import load; load(json.loads(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", command, json.dumps([source, paged])], check=True)
    allocator = fix_mmap_threshold()
    chosen = techniques.build_techniques([Unit(name=name) for name in method.split("+")])
    import peft  # noqa: F401 - part of the runtime
    from transformers import LlamaForCausalLM  # noqa: F401

    loaded = read_resident_memory()
    with MemoryWatch() as watch, use_cpu_threads(1):
        model = models.load_model(settings, TASK, (), seed=0)
        techniques.apply_techniques(chosen, model, TASK, 0)
        techniques.begin_round(chosen, model, 1)
        set_train_mode(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=1e-3)
        batch = make_text(model)
        take_step(model, optimiser, batch)
        before, start = count_reads(model), time.process_time()
        loss = take_step(model, optimiser, batch)
        seconds = time.process_time() - start
    return {
        "paged": paged,
        "techniques": method,
        "runtime_bytes": loaded and loaded.anonymous,
        "anonymous_bytes": watch.anonymous,
        "resident_bytes": peak_rss(),
        "seconds": round(seconds, 2),
        "read_bytes": count_reads(model) - before,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "loss": loss,
        "digest": hash_gradients(model),
        "allocator": allocator,
    }


def load(arguments: list[Any]) -> nn.Module:
    source, paged = arguments
    return models.load_model(ModelSettings.model_validate({"source": source, "paged": paged}), TASK, (), seed=0)


def take_step(model: nn.Module, optimiser: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    torch.manual_seed(1)
    optimiser.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    optimiser.step()
    return float(loss.detach())


def make_text(model: Any) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, TOKENS), generator=random)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def count_reads(model: nn.Module) -> int:
    return sum({layer.matrix.reader: layer.matrix.reader.bytes_read for _, layer in list_paged_layers(model)}.values())


def hash_gradients(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        if parameter.grad is not None:
            digest.update(parameter.grad.numpy().tobytes())
    return digest.hexdigest()[:16]


def make_random_model(
    folder: Path, *, layers: int, width: int, inner: int, heads: int, kv_heads: int, words: int, tied: bool
) -> Path:
    """Write a Llama of random bfloat16 weights, one matrix in memory at a time."""
    from transformers import LlamaConfig

    folder.mkdir(parents=True)
    LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=words,
        tie_word_embeddings=tied,
        pad_token_id=0,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    narrow = width // heads * kv_heads
    block = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width), "model.norm.weight": (width,)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    shapes |= {} if tied else {"lm_head.weight": (words, width)}
    write_random_safetensors(folder / "model.safetensors", shapes)
    return folder


def write_random_safetensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    random = torch.Generator().manual_seed(0)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            weights = torch.ones(shape) if len(shape) == 1 else torch.empty(shape).normal_(0, 0.02, generator=random)
            opened.write(weights.bfloat16().view(torch.uint8).numpy().tobytes())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main()
