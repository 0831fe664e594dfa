"""Claim: nets trained apart from different seeds can be averaged once their units are matched, and REPAIR mends more.

Fashion-MNIST; for each pair of seeds two nets of a kind are trained and merged half and half by the pipeline itself.
mlp     784-512-512-512-10, Adam 1e-3, 25 epochs of 60,000 pictures
cnn     convolutions 16-32-64-64 and a layer of 128 without norms, AdamW 2e-3, 4 epochs of 20,000 pictures
cnn-bn  the same with batch norms
Every align step stands before every renormalise step; naive is none. Calibration pictures come from the training part.
``drop`` is the points of test accuracy below the mean of the two ends, ``barrier`` the training loss above theirs. Test
loss would flatter: a merged net is better calibrated than its over-fitted ends.

Run: python -m benchmarks.rebasin [--pairs 0 1 2] [--nets mlp cnn cnn-bn] [--short]
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.report import save
from fedtune.data import image_samples
from fedtune.merging import MergeContext, build_pipeline, merge_client_updates
from fedtune.recipe.schema import Unit
from fedtune.training import use_cpu_threads
from fedtune.wire.client_update import ClientUpdate, pack

ALIGN: dict[str, dict[str, Any] | None] = {
    "naive": None,
    "weight": {"method": "weight"},
    "activation": {"method": "activation"},
    "activation, inner product": {"method": "activation", "similarity": "inner"},
}
MEND = ("none", "repair", "rescale", "reshift", "bias-calibration")
MEND_NORMED = ("none", "reset", "repair")


class Pictures(NamedTuple):
    """Pixels [n, 1, 28, 28] of mean 0 and deviation 1, and classes [n]."""

    pixels: Tensor
    labels: Tensor


class Kind(NamedTuple):
    """How nets of a kind are trained and merged."""

    examples: int
    epochs: int
    rate: float
    optimiser: type[torch.optim.Optimizer]
    calibration: int
    mends: Sequence[str]


KINDS = {
    "mlp": Kind(60_000, 25, 1e-3, torch.optim.Adam, 2000, MEND),
    "cnn": Kind(20_000, 4, 2e-3, torch.optim.AdamW, 1000, MEND),
    "cnn-bn": Kind(20_000, 4, 2e-3, torch.optim.AdamW, 1000, MEND_NORMED),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nets", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--short", action="store_true", help="one pair, two epochs of 10,000 pictures")
    arguments = parser.parse_args()
    data = clothes()
    rows: list[dict[str, Any]] = []
    with use_cpu_threads(1):
        for pair in arguments.pairs[:1] if arguments.short else arguments.pairs:
            for name in arguments.nets:
                kind = KINDS[name]
                shortened = kind._replace(examples=10_000, epochs=2) if arguments.short else kind
                rows += merged_rows(name, shortened, pair, data)
    save("rebasin", {"short": arguments.short, "gates": gates(rows), "rows": rows})


def clothes() -> dict[str, Pictures]:
    found = {}
    for part, rows in image_samples.fashion_mnist().items():
        pixels = torch.from_numpy(rows.greys()).float().unsqueeze(1) / 255
        found[part] = Pictures((pixels - 0.2860) / 0.3530, torch.tensor(rows["label"]))
    return found


def mlp() -> nn.Sequential:
    widths = (784, 512, 512, 512)
    layers = [layer for n, m in itertools.pairwise(widths) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(512, 10))


def cnn(*, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs, pools in ((1, 16, True), (16, 32, True), (32, 64, True), (64, 64, False)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pools else []
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 128), nn.ReLU(), nn.Linear(128, 10))


def made(name: str) -> nn.Sequential:
    return mlp() if name == "mlp" else cnn(norm=name == "cnn-bn")


def trained(name: str, kind: Kind, seed: int, data: Pictures) -> nn.Sequential:
    torch.manual_seed(seed)
    net = made(name)
    optimiser = kind.optimiser(net.parameters(), lr=kind.rate)  # type: ignore[call-arg]
    for _ in range(kind.epochs):
        for rows in torch.randperm(kind.examples).split(128):
            optimiser.zero_grad()
            F.cross_entropy(net(data.pixels[rows]), data.labels[rows]).backward()
            optimiser.step()
    return net.eval()


def merged_rows(name: str, kind: Kind, pair: int, data: dict[str, Pictures]) -> Iterator[dict[str, Any]]:
    seen = Pictures(*(tensor[: kind.examples] for tensor in data["train"]))
    ends = [trained(name, kind, 2 * pair + which, seen) for which in (0, 1)]
    scores = [scored(end, seen, data["test"]) for end in ends]
    accuracy, loss = (statistics.mean(score[key] for score in scores) for key in ("accuracy", "train_loss"))
    for align, settings in ALIGN.items():
        for mend in kind.mends:
            steps = [*([Unit(name="rebasin", settings=settings)] if settings else []), Unit(name="mean")]
            steps += [] if mend == "none" else [Unit(name=mend)]
            net, seconds = merged(name, steps, ends, seen.pixels[: kind.calibration])
            found = scored(net, seen, data["test"])
            drop, barrier = 100 * (accuracy - found["accuracy"]), found["train_loss"] - loss
            row = {
                "net": name,
                "pair": pair,
                "align": align,
                "mend": mend,
                "ends_accuracy": accuracy,
                "ends_loss": loss,
            }
            row |= {**found, "drop": drop, "barrier": barrier, "seconds": seconds}
            print(row, file=sys.stderr, flush=True)
            yield row


def merged(name: str, steps: list[Unit], ends: list[nn.Sequential], calibration: Tensor) -> tuple[nn.Sequential, float]:
    """The merge of two nets, half and half, over a base of zeros, and the seconds it took."""
    net = made(name).eval()
    batches = [{"input": part} for part in calibration.split(500)]
    start = {key: torch.zeros_like(tensor) for key, tensor in net.state_dict().items()}
    names = [key for key, tensor in start.items() if tensor.is_floating_point()]
    with tempfile.TemporaryDirectory() as folder:
        sent = [spooled(Path(folder), number, end, names) for number, end in enumerate(ends)]
        started = time.perf_counter()
        state = merge_client_updates(
            build_pipeline(steps), start, names, sent, MergeContext(model=made(name), calibration_batches=batches)
        )
        seconds = time.perf_counter() - started
    net.load_state_dict(state)
    return net, seconds


def spooled(folder: Path, number: int, end: nn.Module, names: Sequence[str]) -> ClientUpdate:
    path = folder / f"{number}.safetensors"
    path.write_bytes(pack({name: end.state_dict()[name] for name in names}))
    return ClientUpdate(number, 1, path)


def scored(net: nn.Module, train: Pictures, test: Pictures) -> dict[str, float]:
    with torch.no_grad():
        logits = torch.cat([net(part) for part in test.pixels.split(1000)])
        losses = [
            F.cross_entropy(net(pixels), labels, reduction="sum").item()
            for pixels, labels in zip(train.pixels.split(1000), train.labels.split(1000), strict=True)
        ]
    accuracy = (logits.argmax(1) == test.labels).double().mean().item()
    return {"accuracy": accuracy, "train_loss": sum(losses) / len(train.labels)}


def gates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is claimed beside what was measured: means over pairs, the better of weight and activation for the cnn."""

    def mean(net: str, align: str, mend: str, figure: str) -> float:
        wanted = [row for row in rows if (row["net"], row["align"], row["mend"]) == (net, align, mend)]
        return statistics.mean(float(row[figure]) for row in wanted)

    better = min(("weight", "activation"), key=lambda align: mean("cnn", align, "repair", "barrier"))
    left = mean("cnn", better, "repair", "barrier") / mean("cnn", better, "none", "barrier")
    found = [
        ("mlp naive barrier at least", 1.0, mean("mlp", "naive", "none", "barrier")),
        ("mlp matched by weights, barrier at most", 0.12, mean("mlp", "weight", "none", "barrier")),
        ("mlp matched by weights and repaired, barrier at most", 0.08, mean("mlp", "weight", "repair", "barrier")),
        ("mlp matched by weights and repaired, drop at most", 0.5, mean("mlp", "weight", "repair", "drop")),
        ("cnn naive drop above", 50.0, mean("cnn", "naive", "none", "drop")),
        (f"cnn matched by {better}, drop below", 12.0, mean("cnn", better, "none", "drop")),
        (f"cnn matched by {better} and repaired, drop below", 6.0, mean("cnn", better, "repair", "drop")),
        ("cnn share of the matched barrier that repair cuts, at least", 0.6, 1 - left),
    ]
    return [{"claim": claim, "gate": gate, "measured": measured} for claim, gate, measured in found]


if __name__ == "__main__":
    main()
