"""Fake installed packages: a folder on the import path with modules and a ``.dist-info``."""

from collections.abc import Mapping
from pathlib import Path

__all__ = ["TECHNIQUE", "install"]

TECHNIQUE = '''"""Last layer: train the parameters of the last module.

What: everything but the last module is frozen.
Source: a test.
"""

from typing import ClassVar

from pydantic import Field
from torch import nn

from fedtune.tasks import Task
from fedtune.techniques import Technique


class LastLayer(Technique):
    """Train the last module."""

    name: ClassVar[str] = "last-layer"

    share: float = Field(1.0, gt=0, le=1, description="not used")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Unfreeze the last module that has parameters."""
        for parameter in [one for one in model.children() if any(True for _ in one.parameters())][-1].parameters():
            parameter.requires_grad_(True)
'''


def install(
    folder: Path, package: str, points: Mapping[str, Mapping[str, str]], modules: Mapping[str, str] | None = None
) -> Path:
    """Write a package with entry points by group; ``modules`` are its files by name. ``folder`` goes on the path."""
    information = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in named.items())
        for group, named in points.items()
    ]
    (information / "entry_points.txt").write_text("\n".join(lines))
    for name, text in (modules or {}).items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return folder
