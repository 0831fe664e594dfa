"""Claims: MobileTL's gradients are exact where it says so, its blocks keep a fraction, and so does the process.

accounting  the published figures of one inverted residual block (96 channels widened 6-fold, 7 x 7, batch 8), by the
            paper's own accounting: a plain ReLU6 keeps two bits, a mask one, a gate 1.05 maps, a norm its parameters.
            No tensor is made.
gradients   EfficientNet-Lite0 in double precision, statistics frozen: every trained tensor against autograd of the
            untouched net.
block       the same block alone, in bytes PyTorch really keeps: ``stock`` is last-blocks, whose layers are PyTorch's.
steps       whole steps of EfficientNet-Lite0 at 96 pixels, each in a fresh process on one thread. At batch 8 what is
            kept at the end of the forward pass; at batch 32 the process's peak over the loaded model, too: with plain
            SGD, and with AdamW, whose state both arms hold alike. Most of the difference is due to micro-batches; last-
            blocks with micro_batch: 1 and MobileTL without stand beside, so that each share is seen.
flops       of one step at batch 8: multiply-adds of convolutions and linear layers, counted as two each.

Run: python -m benchmarks.mobiletl_memory [--short]
"""

import argparse
import sys
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import save
from fedtune import models, techniques
from fedtune.memory import StorageMeter
from fedtune.models.classifier import ImageClassifier
from fedtune.models.efficientnet_lite import LiteBlock
from fedtune.models.layers import GlobalAveragePool, make_conv_norm
from fedtune.models.mobilenet_v3 import V3Block
from fedtune.profiling import ProfileCase, format_techniques, profile_in_subprocess
from fedtune.recipe.schema import ModelSettings, Recipe, Unit
from fedtune.tasks import get_task
from fedtune.training import compute_step_loss, set_train_mode

__all__ = ["accounting", "chart"]

LITE0 = "sample:efficientnet-lite0"
LABELS = tuple(str(label) for label in range(10))
ROWS, CHANNELS, EXPANSION, SIDE = 8, 96, 6, 7


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="one number of blocks, plain SGD alone")
    short = parser.parse_args().short
    result = {
        "accounting": {**accounting(), **chart()},
        "gradients": [exactness(k) for k in ((1,) if short else (1, 3, 5))],
        "block": [block("v2"), block("v3")],
        "flops": flops(),
        "steps": [step(**one) for one in steps(short)],
    }
    save("mobiletl_memory", result)


def accounting() -> dict[str, float]:
    """Percent less memory in a block, by the paper's accounting."""
    a = 4 * ROWS * CHANNELS * SIDE**2
    wide = EXPANSION * a
    bit = wide / 32
    inner, last = 4 * 2 * EXPANSION * CHANNELS, 4 * 2 * CHANNELS
    gate = 1.05 * wide
    convolutions = a + 2 * wide
    v2 = convolutions + 2 * wide + a + 2 * inner + last + 2 * 2 * bit
    v3 = convolutions + 2 * wide + a + 2 * wide + gate
    ours = convolutions + a + 2 * bit
    return {"v2_less": 100 * (1 - (ours + last) / v2), "v3_less": 100 * (1 - (ours + gate) / v3)}


def chart() -> dict[str, float]:
    """Percent less for five blocks than for full tuning, from the numbers on the authors' chart of MobileNetV3."""
    five, full = (975.0, 902.7, 35.9), (1000.6, 1934.9, 129.7)
    return {
        "chart_flops_less": 100 * (1 - sum(five[:2]) / sum(full[:2])),
        "chart_stored_less": 100 * (1 - five[2] / full[2]),
    }


def exactness(blocks: int) -> dict[str, float]:
    """The largest relative difference of any trained tensor's gradient."""
    batch = pictures(4, 96, torch.float64)
    model, plain = lite0().double(), lite0().double()
    names = apply(model, "mobiletl", blocks=blocks, last_norm="frozen", head="train")
    found = gradients(model, batch)
    plain.requires_grad_(False)
    for name in names:
        plain.get_parameter(name).requires_grad_(True)
    wanted = gradients(plain, batch)
    errors = [float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in names]
    return {"blocks": blocks, "tensors": len(errors), "largest_error": max(errors)}


def block(kind: str) -> dict[str, Any]:
    """Bytes one block keeps, without the classifier behind it."""
    kept = {}
    for technique in ("head-only", "last-blocks", "mobiletl"):
        torch.manual_seed(0)
        model = OneBlock(kind)
        apply(model, technique, **({} if technique == "head-only" else {"blocks": 1}))
        kept[technique] = kept_bytes(model, pictures(ROWS, SIDE))
    stock, ours = (kept[name] - kept["head-only"] for name in ("last-blocks", "mobiletl"))
    return {"block": kind, "stock_bytes": stock, "mobiletl_bytes": ours, "less": 100 * (1 - ours / stock)}


class OneBlock(ImageClassifier):
    """An inverted residual block between a frozen convolution and a classifier."""

    kind = "one-block"
    head_name = "fc"

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = make_conv_norm(3, CHANNELS)
        hidden = EXPANSION * CHANNELS
        v3 = V3Block(CHANNELS, hidden, CHANNELS, 3, 1, nn.Hardswish, squeezes=True)
        self.block = v3 if kind == "v3" else LiteBlock(CHANNELS, CHANNELS, EXPANSION, 3, 1)
        self.pool, self.fc = GlobalAveragePool(), nn.Linear(CHANNELS, len(LABELS))

    def stages(self) -> list[nn.Module]:
        return [self.stem, self.block, nn.Sequential(self.pool, self.fc)]


def flops() -> dict[str, Any]:
    """Of one step, and five blocks' share of full tuning; MobileTL's products are those of its twin."""
    found = {}
    arms: list[tuple[str, dict[str, Any]]] = [("full", {}), ("mobiletl", {"blocks": 5, "stored_activations": True})]
    for technique, settings in arms:
        model = lite0()
        apply(model, technique, **settings)
        found[technique] = counted(model, pictures(8, 96))
    return {**found, "share": found["mobiletl"] / found["full"]}


def counted(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Twice the multiply-adds of convolutions and linear layers: forwards, by the weight and by the input."""
    total = 0

    def count(layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        products = 1 + int(layer.weight.requires_grad) + int(args[0].requires_grad)
        total += 2 * products * out.numel() * layer.weight[0].numel()

    hooks = [
        layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    set_train_mode(model)
    compute_step_loss(get_task("image-classification"), model, batch)
    for hook in hooks:
        hook.remove()
    return total


def steps(short: bool) -> list[dict[str, Any]]:
    tops = [(name, {"blocks": k}) for name in ("mobiletl", "last-blocks") for k in (1, 3, 5)]
    others: list[tuple[str, dict[str, Any]]] = [
        (name, {}) for name in ("full", "batch-norm", "bias", "tinytl", "head-only")
    ]
    whole = [("mobiletl", {"blocks": 3, "micro_batch": 32})]
    pieces = [("last-blocks", {"blocks": k, "micro_batch": 1}) for k in (1, 3, 5)]
    chosen = [tops[1], tops[4], others[0]] if short else [*tops, *others, *whole, *pieces]
    runs = [("sgd", 32)] if short else [("sgd", 8), ("sgd", 32), ("adamw", 32)]
    return [
        {"technique": name, "settings": settings, "optimiser": optimiser, "batch": batch}
        for (optimiser, batch), (name, settings) in product(runs, chosen)
    ]


def step(technique: str, settings: dict[str, Any], optimiser: str, batch: int) -> dict[str, Any]:
    """What ``fedtune profile`` measures, in a process of its own."""
    units = [Unit(name=technique, settings=settings)]
    train = {
        "techniques": units,
        "optimiser": optimiser,
        "batch_size": batch,
        "image_size": 96,
        "local_steps": 1,
        "threads": 1,
    }
    recipe = Recipe.model_validate(
        {
            "name": "mobiletl-memory",
            "task": "image-classification",
            "model": {"source": LITE0},
            "data": {"source": "random"},
            "devices": [{"count": 1}],
            "train": train,
            "federation": {"rounds": 1},
        }
    )
    row = asdict(profile_in_subprocess(ProfileCase(format_techniques(units), recipe.model_dump_json(), LABELS, None)))
    if "rss_bytes" in row:
        row["over_loaded_bytes"] = row["rss_bytes"] - row["loaded_bytes"]
    found = {"optimiser": optimiser, "batch": batch, **row}
    print(found, file=sys.stderr, flush=True)
    return found


def lite0() -> nn.Module:
    return models.load_model(ModelSettings(source=LITE0), get_task("image-classification"), LABELS, seed=0)


def apply(model: nn.Module, technique: str, **settings: Any) -> list[str]:
    chosen = techniques.build_techniques([Unit(name=technique, settings=settings)])
    return techniques.apply_techniques(chosen, model, get_task("image-classification"), 0)


def pictures(rows: int, side: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(rows, 3, side, side, generator=random).to(dtype)
    return {"pixel_values": pixels, "labels": torch.arange(rows) % len(LABELS)}


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.eval()
    compute_step_loss(get_task("image-classification"), model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def kept_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    set_train_mode(model)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss = compute_step_loss(get_task("image-classification"), model, batch)
        kept = meter.current_bytes
    loss.backward()
    return kept


if __name__ == "__main__":
    main()
