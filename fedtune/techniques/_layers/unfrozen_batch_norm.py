"""A batch norm whose statistics follow the data; they are shared like parameters, unless they are local."""

from collections.abc import Iterator
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["UnfrozenBatchNorm2d", "list_local_tensors", "list_running_statistics"]

_FEWEST = 32
"""Values per channel that a batch statistic needs; of fewer it would be mostly noise."""


class UnfrozenBatchNorm2d(nn.BatchNorm2d):
    """In training it normalises by the batch and moves its running statistics, unless the batch is too small."""

    is_local: bool = False
    """Whether each device keeps parameters and statistics for itself."""

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, local: bool = False) -> Self:
        """One that takes over a norm's parameters and statistics."""
        made = cls(norm.num_features, norm.eps, 0.1 if norm.momentum is None else norm.momentum)
        made.weight, made.bias = norm.weight, norm.bias
        made.running_mean, made.running_var = norm.running_mean, norm.running_var
        made.num_batches_tracked = norm.num_batches_tracked
        made.is_local = local
        return made.train(norm.training)

    def to_plain_layer(self) -> nn.BatchNorm2d:
        """An ordinary norm of the same parameters and statistics."""
        made = nn.BatchNorm2d(self.num_features, self.eps, self.momentum)
        made.load_state_dict(self.state_dict())
        return made.train(self.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name nn.BatchNorm2d gives it
        """[n, c, h, w] -> [n, c, h, w]."""
        assert self.momentum is not None
        by_batch = self.training and input.numel() >= _FEWEST * self.num_features
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, by_batch, self.momentum, self.eps
        )


def list_running_statistics(model: nn.Module) -> Iterator[str]:
    """Names of the statistics that are trained and shared."""
    for name, layer in model.named_modules():
        if isinstance(layer, UnfrozenBatchNorm2d) and not layer.is_local:
            yield f"{name}.running_mean"
            yield f"{name}.running_var"


def list_local_tensors(model: nn.Module) -> list[str]:
    """Names of the tensors that each device keeps for itself: they are trained, but neither sent nor merged."""
    return [
        f"{name}.{part}"
        for name, layer in model.named_modules()
        if isinstance(layer, UnfrozenBatchNorm2d) and layer.is_local
        for part in ("weight", "bias", "running_mean", "running_var")
        if getattr(layer, part) is not None
    ]
