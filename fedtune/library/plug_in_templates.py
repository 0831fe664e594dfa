"""The files of a new package, as templates: ``$name`` is the method's name in recipes."""

from collections.abc import Mapping

__all__ = ["MODULES", "PROJECT", "TEST"]

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedtune-$name"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["fedtune"]

[project.entry-points."$group"]
$name = "$module:$class_name"

[tool.hatch.build.targets.wheel]
include = ["$module.py"]
"""

TEST = '''\
"""$title passes the checks of fedtune. Install the package first: pip install -e ."""

from fedtune.library.plug_in_check import check_plug_in


def test_it_passes_the_checks_of_fedtune() -> None:
    assert [result for result in check_plug_in("$name") if result.status == "failed"] == []
'''

_TECHNIQUE = '''\
"""$title: one line that says what it does.

What: the equation or the rule, in a sentence or two. This start trains the biases and the norms.
Saves: the memory or the bytes that it saves.
Use when: the case for it.
Avoid when: the case against it.
Source: the paper.
"""

from typing import ClassVar

from pydantic import Field
from torch import nn

from fedtune.errors import ModelError
from fedtune.tasks import Task
from fedtune.techniques import Technique


class $class_name(Technique):
    """Its fields are its settings. Every hook is optional; see fedtune.techniques.Technique."""

    name: ClassVar[str] = "$name"

    largest: int = Field(1, ge=1, description="parameters of at most so many dimensions are trained")

    def rewrite_model(self, model: nn.Module, task: Task, seed: int) -> None:
        """Unfreeze what is trained. The model comes frozen."""
        chosen = [parameter for parameter in model.parameters() if parameter.dim() <= self.largest]
        if not chosen:
            raise ModelError(f"{type(model).__name__} has nothing that $name trains; choose another technique")
        for parameter in chosen:
            parameter.requires_grad_(True)
'''

_TASK = '''\
"""$title: one line that says what a model learns.

What: this start classifies texts, with the loss and the metrics of text-classification.
Columns: ``text`` and ``label``.
Loss: cross entropy.
Metrics: accuracy and loss.
"""

from typing import ClassVar

from fedtune.tasks import ScoreSums
from fedtune.tasks.text_classification import TextClassification


class $class_name(TextClassification):
    """See fedtune.tasks.Task for what a task can change."""

    name: ClassVar[str] = "$name"

    def compute_metrics(self, sums: ScoreSums) -> dict[str, float]:
        """All metrics over some examples, by name."""
        return {**super().compute_metrics(sums), "error": 1 - sums.accuracy}
'''

_MERGE_STEP = '''\
"""$title: one line that says how deltas become one.

What: the equation. This start is a weighted mean, scaled.
Memory: one chunk of one tensor per model.
Use when: the case for it.
Avoid when: the case against it.
Source: the paper.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtune.merging import CombineStep, MergeInput, Shape
from fedtune.wire.client_update import iter_row_chunks


class $class_name(CombineStep):
    """Its fields are its settings. AlignStep, RelaxStep and RenormaliseStep are the other kinds of steps."""

    name: ClassVar[str] = "$name"

    scale: float = Field(1.0, gt=0, description="factor on the mean")

    def combine(self, name: str, shape: Shape, merge_inputs: Sequence[MergeInput]) -> Iterator[Tensor]:
        """The merged delta of one tensor, chunk by chunk, in fp32."""
        for start, stop in iter_row_chunks(shape):
            rows = [one.read_rows(name, start, stop) * one.weight for one in merge_inputs]
            yield torch.stack(rows).sum(0) * self.scale
'''

MODULES: Mapping[str, str] = {"technique": _TECHNIQUE, "task": _TASK, "merge-step": _MERGE_STEP}
"""The module of each kind."""
