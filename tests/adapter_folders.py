"""Adapter folders as peft writes them, and what plain peft says they add."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedtune.merging import CombineStep, build_pipeline
from fedtune.recipe.schema import Unit

__all__ = [
    "IDS",
    "PLAIN",
    "adapter",
    "assert_adds",
    "deltas",
    "loaded",
    "net",
    "several",
    "spoil",
    "step",
    "wanted",
    "whole",
]


class Net(nn.Module):
    """An embedding, square and oblong linear layers, one named like the end of another, a kernel and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.block = nn.ModuleDict({"fc": nn.Linear(8, 8), "kernel": nn.Conv2d(1, 6, 3)})
        self.fc = nn.Linear(36, 10, bias=False)
        self.head = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.block["fc"](self.tokens(ids))
        out: Tensor = self.head(self.fc(self.block["kernel"](hidden[:, None]).flatten(2).mean(2).repeat(1, 6)))
        return out


IDS = torch.arange(40).reshape(5, 8) % 11
TARGETS = ["tokens", "block.fc", "block.kernel", "fc"]


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def adapter(folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter as peft writes it, with random factors and whatever else is trained."""
    model = get_peft_model(net(), LoraConfig(**{"target_modules": TARGETS, "r": 2, "lora_alpha": 6, **settings}))
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape, generator=random)
    model.save_pretrained(folder)
    return folder


def several(folder: Path, *settings: dict[str, Any]) -> list[Path]:
    return [adapter(folder / str(seed), seed, **one) for seed, one in enumerate(settings)]


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(net(), str(folder)).eval()


def deltas(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to each weight, as plain peft computes it."""
    layers = {
        name: layer for name, layer in loaded(folder).base_model.model.named_modules() if hasattr(layer, "lora_A")
    }
    return {name: layer.get_delta_weight("default").double() for name, layer in layers.items()}


def wanted(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted sums of what the adapters add."""
    total: dict[str, Tensor] = {}
    for weight, folder in zip(weights, folders, strict=True):
        for name, delta in deltas(folder).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


def assert_adds(folder: Path, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    found = deltas(folder)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= tolerance * delta.norm(), name


PLAIN: dict[str, Any] = {}


def step(name: str, **settings: Any) -> CombineStep:
    return build_pipeline([Unit(name=name, settings=settings)]).combine


def whole(folder: Path) -> dict[str, Tensor]:
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if ".lora_A" not in name and ".lora_B" not in name}


def spoil(change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """An adapter whose configuration or tensors are changed by hand."""

    def spoilt(folder: Path) -> None:
        config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
        settings, found = json.loads(config.read_text()), safetensors.torch.load_file(tensors)
        change(settings, found)
        config.write_text(json.dumps(settings))
        safetensors.torch.save_file(found, tensors)

    return spoilt
