"""RESET: compute the running statistics of a merged net's batch norms again.

What: runs forward passes over calibration data with batch norms in training mode. Running means and variances become
the cumulative average over batches. Weights stay as merged. The averaged statistics of the input models would not fit,
because the activations of the merged net vary less.
Memory: the model and one batch.
Needs: some hundred training inputs without labels, in batches that are not tiny.
Use when: the merged net has batch norms and one pass over the data per layer is too expensive. Repair does more, at
that cost.
Avoid when: the net has no batch norms, or the clients of a federation stay close, so that averaged statistics already
fit.
Source: Jordan et al. (arXiv 2211.08403), section 3; Izmailov et al. (arXiv 1803.05407), section 3.2, on doing this
after averaging weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedtune.accelerator import find_device, move_tensors
from fedtune.errors import ModelError
from fedtune.merging._layer_hooks import use_state_dict
from fedtune.merging._step import MergeContext, RenormaliseStep
from fedtune.merging.renormalise._moment_step import require_model_and_batches

__all__ = ["Reset"]

_BatchNorm = nn.modules.batchnorm._BatchNorm


class Reset(RenormaliseStep):
    """Recomputes the statistics of batch norms on the merged network."""

    name: ClassVar[str] = "reset"

    def renormalise(
        self, merged: Mapping[str, Tensor], ends: Sequence[tuple[float, Mapping[str, Tensor]]], context: MergeContext
    ) -> dict[str, Tensor]:
        """The new running means and variances."""
        net, batches = require_model_and_batches(self.name, context)
        norms = {name: norm for name, norm in net.named_modules() if _collects(norm)}
        if not norms:
            raise ModelError(f"reset: {type(net).__name__} has no batch norm with running statistics; use repair")
        with use_state_dict(net, merged), _collecting(list(norms.values())), torch.no_grad():
            for batch in batches:
                net(**move_tensors(batch, find_device(net)))
            found = {f"{name}.{key}": tensor for name, norm in norms.items() for key, tensor in norm.named_buffers()}
            return {
                key: found[key].to("cpu", copy=True) for key in found if key.endswith(("running_mean", "running_var"))
            }


def _collects(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.track_running_stats


@contextmanager
def _collecting(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Batch norms in training mode with empty statistics and the cumulative average (a momentum of None)."""
    momenta = []
    for norm in norms:
        assert isinstance(norm, _BatchNorm)
        momenta.append((norm, norm.momentum))
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
            norm.eval()
