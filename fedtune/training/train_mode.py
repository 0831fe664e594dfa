"""Training mode, in which batch norms keep their statistics unless a technique trains them."""

from torch import nn

from fedtune.techniques import UnfrozenBatchNorm2d

__all__ = ["freeze_batch_norm_statistics", "set_train_mode"]


def set_train_mode(model: nn.Module) -> None:
    """Set the model to training mode. Batch norms stay in evaluation mode, except those that a technique trains."""
    model.train()
    freeze_batch_norm_statistics(model)


def freeze_batch_norm_statistics(model: nn.Module) -> None:
    """Let batch norms use the statistics of the pretrained model, except where a technique trains them."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, UnfrozenBatchNorm2d):
            layer.eval()
