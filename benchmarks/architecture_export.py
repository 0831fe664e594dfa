"""What plain transformers and peft make of an export, beside the model that was trained."""

from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.architecture_bench import Bench
from fedtune import techniques
from fedtune.errors import FedtuneError
from fedtune.export import write_export
from fedtune.models.read_past import read_past
from fedtune.recipe.schema import Recipe

__all__ = ["exported", "logits"]


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of a batch, labels left out."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    found: Tensor = model.eval()(**inputs).logits
    return found


def exported(
    bench: Bench, recipe: Recipe, state: dict[str, Tensor], form: Any, folder: Path, batch: Any, wanted: Tensor
) -> float | None:
    """The difference of logits after a round trip; None where there is no adapter, or no export at all."""
    target = folder / f"{bench.name}-{recipe.train.techniques[0].name}-{form}"
    try:
        made = write_export(recipe, bench.labels, state, target, form, "")
    except FedtuneError:
        return None
    if form is None and made == "model":
        return None
    auto = getattr(transformers, bench.task.auto_class)
    if made == "model":
        loaded = auto.from_pretrained(target, trust_remote_code=True)
    else:
        loaded = PeftModel.from_pretrained(_base(bench, recipe), str(target))
    return float((logits(loaded, batch) - wanted).abs().max() / wanted.abs().max())


def _base(bench: Bench, recipe: Recipe) -> Any:
    """What an adapter is put beside, in four bits where it was trained so."""
    settings: dict[str, Any] = {"num_labels": len(bench.labels)} if bench.labels else {}
    four_bits = [one.make_quantisation_config() for one in techniques.build_techniques(recipe.train.techniques)]
    if four_bits != [None]:
        four_bits[0].llm_int8_skip_modules = _head(bench)
        settings |= {"quantization_config": four_bits[0], "device_map": "cpu"}
    loaded = getattr(transformers, bench.task.auto_class).from_pretrained(bench.folder, **settings)
    for layer in loaded.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # its kernel wants wider layers than these
    return loaded


def _head(bench: Bench) -> list[str]:
    loaded = getattr(transformers, bench.task.auto_class).from_pretrained(bench.folder)
    return [name for name, _ in loaded.named_children() if name != loaded.base_model_prefix] + read_past(loaded)
