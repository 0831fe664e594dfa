"""Claims: what activation pruning stores is what its formula says, and how far its weight gradients point elsewhere.

formats   bytes per entry of a million drawn numbers, as stored, beside the formula: 4 r + 1/8 or 8 r, 2 r + 1/8 or 6 r.
lite0     EfficientNet-Lite0, its last 3 blocks and the head convolution, 8 pictures of Fashion-MNIST at 96 pixels;
          trained as PyTorch does (last-blocks) and with MobileTL's masks.
resnet18  ResNet-18 for small pictures, all of it trained, 8 pictures at 32 pixels, with batch norms and normalised.
minilm    MiniLM, 5 texts of 64 tokens, LoRA of rank 8 on query and value or on all linear layers in the round that
          trains A, and all weights. ``unshared`` stores a tensor again for each layer it is given to.

``kept_bytes``: unique storages alive at the end of the forward pass, without parameters and buffers (our meter).
``cosine`` to the gradient of the same step without pruning: ``mean`` and ``min`` over the weights of trained layers,
``equal`` how many of them are bit-equal (at least as many zeros as are pruned), ``by_kind`` the mean over layers of a
kind; ``others_equal`` says whether all other gradients are. Trained tensors start with
drawn numbers added to them (standard deviation 0.02), since B = 0 would leave A without a gradient. No dropout.

Run: python -m benchmarks.activation_pruning [--short]
"""

import argparse
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.report import save
from fedtune import models, tasks, techniques
from fedtune.memory import StorageMeter
from fedtune.recipe.schema import Recipe, Unit
from fedtune.tasks import get_task
from fedtune.techniques import begin_round, begin_step
from fedtune.techniques.pruning._pruned_input_layers import RecentInputs
from fedtune.techniques.pruning._pruned_tensor import PruningRule, pack_pruned
from fedtune.training import compute_step_loss, set_train_mode, use_cpu_threads

Tensors = Mapping[str, Tensor]
Row = dict[str, Any]

PRUNINGS = [{"prune": prune, "values": values} for prune in (0.5, 0.7, 0.9) for values in ("full", "half")]
RULES = [
    {"prune": prune, "per": per, "centre": centre}
    for prune in (0.5, 0.7, 0.9)
    for per in ("row", "tensor")
    for centre in (False, True)
]
KINDS = {
    "attention.self": "query, key, value",
    "attention.output": "attention out",
    "intermediate": "feed-forward up",
    "output": "feed-forward down",
}
"""What a layer of MiniLM is called by a part of its name, the first that fits."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true", help="one pruning a base")
    short = parser.parse_args().short
    with use_cpu_threads(1):
        save("activation_pruning", {"formats": formats(), "rows": [*told(vision(short)), *told(minilm(short))]})


def told(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        print(row, file=sys.stderr, flush=True)
        yield row


def formats() -> list[Row]:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    rows = []
    for share in (0.5, 0.3, 0.1, 0.03):
        for values, size in (("full", 4), ("half", 2)):
            packed = pack_pruned(x, PruningRule(round(1 - share, 2), values == "half"), len(x))
            stored = sum(tensor.untyped_storage().nbytes() for tensor in packed.tensors)
            formula = min(size * share + 1 / 8, (size + 4) * share)
            rows.append(
                {
                    "share": share,
                    "values": values,
                    "places": packed.layout.position_format,
                    "bytes_per_entry": stored / len(x),
                    "formula": formula,
                }
            )
    return rows


def vision(short: bool) -> Iterator[Row]:
    prunings = PRUNINGS[:1] if short else PRUNINGS
    for base in ("last-blocks", "mobiletl"):
        recipe = an_image_recipe("efficientnet-lite0", 96, [Unit(name=base, settings={"blocks": 3})])
        yield from compared("lite0", recipe, 1, prunings)
    recipe = an_image_recipe("resnet18-small", 32, [Unit(name="full")])
    yield from compared("resnet18", recipe, 1, prunings)
    yield from compared("resnet18", recipe, 1, [{**one, "normalise": True} for one in prunings])


def minilm(short: bool) -> Iterator[Row]:
    rules = RULES[:1] if short else RULES
    for targets in ("all-linear", ["query", "value"]):
        recipe = a_text_recipe([Unit(name="lora", settings={"targets": targets})])
        yield from compared("minilm", recipe, 2, rules)
        with patch.object(RecentInputs, "pack", lambda _, *given: pack_pruned(*given)):
            yield from ({**row, "unshared": True} for row in compared("minilm", recipe, 2, rules[:1]))
    yield from compared("minilm", a_text_recipe([Unit(name="full")]), 1, rules)


def compared(part: str, recipe: Recipe, number: int, settings: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """A row for the step without pruning, and one for each way of pruning it; normalised nets are their own base."""
    batch = a_batch(recipe)
    base = "+".join(f"{unit.name}{unit.settings or ''}" for unit in recipe.train.techniques)
    normalised = any("normalise" in one for one in settings)
    whole: dict[str, Any] = {"prune": 0.0, "normalise": True}
    wanted, kept = a_step(recipe, [whole] if normalised else [], batch, number)
    yield {"part": part, "base": base, "pruning": whole if normalised else None, "kept_bytes": kept}
    for one in settings:
        found, kept = a_step(recipe, [one], batch, number)
        yield {"part": part, "base": base, "pruning": dict(one), "kept_bytes": kept, **likeness(found, wanted)}


def likeness(found: Tensors, wanted: Tensors) -> Row:
    """How gradients compare with those of the step without pruning."""
    weights = {name for name, tensor in wanted.items() if tensor.dim() > 1 and "embedding" not in name}
    cosines = {name: cosine(found[name], wanted[name]) for name in sorted(weights)}
    kinds: dict[str, list[float]] = {}
    for name, value in cosines.items():
        kinds.setdefault(kind_of(name), []).append(value)
    return {
        "cosine": {"mean": fmean(cosines.values()), "min": min(cosines.values())},
        "by_kind": {kind: fmean(values) for kind, values in kinds.items()},
        "equal": [sum(torch.equal(found[name], wanted[name]) for name in weights), len(weights)],
        "others_equal": all(torch.equal(found[name], wanted[name]) for name in wanted if not_a(name, weights)),
    }


def not_a(name: str, weights: Collection[str]) -> bool:
    """Whether a gradient is to be exact; gains are part of the weights of normalised convolutions."""
    return name not in weights and not name.endswith(".gain")


def kind_of(name: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in name), "other")


def cosine(found: Tensor, wanted: Tensor) -> float:
    return float(nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0))


def a_step(
    recipe: Recipe, pruning: Sequence[Mapping[str, Any]], batch: Tensors, number: int
) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step, and the bytes kept for it."""
    units = [*recipe.train.techniques, *(Unit(name="activation-pruning", settings=dict(one)) for one in pruning)]
    model = models.load_model(recipe.model, get_task(recipe.task), [str(label) for label in range(10)], seed=0)
    chosen = techniques.build_techniques(units)
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    shake(model, techniques.apply_techniques(chosen, model, get_task(recipe.task), 0))
    begin_round(chosen, model, number)
    set_train_mode(model)
    begin_step(chosen, model, batch, 0.0)
    torch.manual_seed(0)
    with StorageMeter(excluded=[*model.parameters(), *model.buffers()]) as meter:
        loss = compute_step_loss(get_task(recipe.task), model, batch)
        kept = meter.current_bytes
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, kept


def shake(model: nn.Module, names: Sequence[str]) -> None:
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=random)


def an_image_recipe(model: str, side: int, units: Sequence[Unit]) -> Recipe:
    return a_recipe(model, "image-classification", "fashion-mnist", units, batch=8, image=side)


def a_text_recipe(units: Sequence[Unit]) -> Recipe:
    return a_recipe("minilm", "text-classification", "sentiment", units, batch=5, length=64)


def a_recipe(model: str, task: str, source: str, units: Sequence[Unit], **train: int) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "activation-pruning",
            "task": task,
            "model": {"source": f"sample:{model}"},
            "data": {"source": f"sample:{source}"},
            "devices": [{"count": 2}],
            "train": {"local_steps": 1, "techniques": list(units), **train},
            "federation": {"rounds": 2},
        }
    )


def a_batch(recipe: Recipe) -> Tensors:
    """The first training examples; of texts, those that fill the length."""
    encoded = tasks.encode_examples(tasks.load_data(recipe).train, recipe, tasks.load_reader(recipe))
    if encoded.lengths is None:
        return encoded.make_batch(list(range(recipe.train.batch_size)))
    long = (encoded.lengths >= recipe.train.max_length).nonzero()[:, 0].tolist()
    return encoded.make_batch(long[: recipe.train.batch_size])


if __name__ == "__main__":
    main()
