"""Small models whose matrices are in a store, and twins of them in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedtune import models
from fedtune.models.paging import page_layers
from fedtune.models.paging.byte_readers import FileBytes, HeldBytes
from fedtune.models.paging.paged_layers import list_paged_layers
from fedtune.recipe.schema import ModelSettings
from tests.families import FAMILIES, Family

__all__ = ["LABELS", "count_reads", "load_family", "read_from_memory", "save_family", "take_step"]

LABELS = ("a", "b", "c")


def save_family(name: str, folder: Path) -> Path:
    """Save a small model of a family, unless it is there."""
    if not folder.is_dir():
        FAMILIES[name].model().save_pretrained(folder)
    return folder


def load_family(name: str, folder: Path, paged: bool | str, **settings: Any) -> nn.Module:
    """Load a small model of a family from its folder."""
    family = FAMILIES[name]
    chosen = ModelSettings.model_validate({"source": f"path:{save_family(name, folder)}", "paged": paged, **settings})
    return models.load_model(chosen, family.task, LABELS if family.task.has_classes else (), seed=3)


@contextmanager
def read_from_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Open stores in memory inside the block."""
    with monkeypatch.context() as patch:
        patch.setattr(page_layers, "FileBytes", HeldBytes)
        yield


def take_step(family: Family, model: nn.Module) -> dict[str, Tensor]:
    """The loss and the gradients of a step with dropout, with low-rank pairs that are not zero."""
    random = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=random)
    torch.manual_seed(5)
    loss: Tensor = model.train()(**family.make_batch()).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def count_reads(model: nn.Module) -> int:
    """The bytes that were read from the model's store."""
    readers = {layer.matrix.reader for _, layer in list_paged_layers(model)}
    assert all(isinstance(reader, FileBytes) for reader in readers)
    return sum(reader.bytes_read for reader in readers)
