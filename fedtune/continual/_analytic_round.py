"""The device's part of an analytic head: the sums over its examples at the end of a task."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.continual._feature_sums import FeatureSums, select_shared_rows, sum_features
from fedtune.continual._head_features import find_head_layer, hash_backbone, iter_features
from fedtune.continual._method import MethodRound, MethodSetup
from fedtune.techniques import build_techniques
from fedtune.wire.client_update import TensorSpec

__all__ = ["AnalyticRound", "declare_sums", "read_sums"]

Precision = Literal["float32", "float64"]
_DTYPES: Mapping[Precision, tuple[str, torch.dtype]] = {
    "float32": ("F32", torch.float32),
    "float64": ("F64", torch.float64),
}


def declare_sums(head: nn.Linear, precision: Precision, num_tasks: int | None) -> dict[str, TensorSpec]:
    """Return the form of an upload. With ``num_tasks`` it says which tasks the sums include."""
    classes, width = head.weight.shape
    dtype = _DTYPES[precision][0]
    forms = {
        "counts": TensorSpec((classes,), dtype, negative=False),
        "totals": TensorSpec((classes, width), dtype),
        "gram": TensorSpec((width * (width + 1) // 2,), dtype),
        "backbone": TensorSpec((32,), "U8", 256),
    }
    return forms if num_tasks is None else {**forms, "included": TensorSpec((num_tasks,), "U8", 2)}


def read_sums(tensors: Mapping[str, Tensor]) -> FeatureSums:
    """Return the sums of an upload, in double precision."""
    return FeatureSums(*(tensors[name].double() for name in FeatureSums._fields))


class AnalyticRound(MethodRound):
    """The sums of one client. With ``renews`` they are over all tasks begun whose examples it still holds."""

    def __init__(self, setup: MethodSetup, *, fewest: int, renews: bool, precision: Precision) -> None:
        self._setup, self._fewest, self._renews = setup, fewest, renews
        self._dtype = _DTYPES[precision][1]

    def compute_upload(self) -> dict[str, Tensor]:
        """Return the sums and the digest of the model that computed the features."""
        setup = self._setup
        model, held = setup.model, setup.held_rows if self._renews else {setup.place.task: setup.rows}
        batch_size = setup.micro_batch_size or setup.recipe.train.batch_size
        rows = self._select_rows(np.sort(np.concatenate([*held.values()])).tolist(), batch_size)
        techniques = build_techniques(setup.recipe.train.techniques)
        head = find_head_layer(model)[1]
        batches = iter_features(model, techniques, setup.examples, rows, batch_size)
        sums = sum_features(batches, *head.weight.shape)
        upload = {name: tensor.to(self._dtype) for name, tensor in sums._asdict().items()}
        upload["backbone"] = hash_backbone(model, {})
        if self._renews:
            upload["included"] = torch.zeros(setup.num_tasks, dtype=torch.uint8)
            upload["included"][[task for task, own in held.items() if len(own)]] = 1
        return upload

    def _select_rows(self, rows: Sequence[int], batch_size: int) -> list[int]:
        """Return the rows of the classes with enough examples. Inputs are read in batches, as images take memory."""
        make_batch, starts = self._setup.examples.make_batch, range(0, len(rows), batch_size)
        labels = torch.cat([make_batch(rows[start : start + batch_size])["labels"] for start in starts])
        return [rows[at] for at in select_shared_rows(labels, self._fewest).tolist()]
