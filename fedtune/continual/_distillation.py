"""LwF's distillation term: old classes keep the probabilities that the model of the last border gives them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedtune.accelerator import use_autocast
from fedtune.continual._fisher_sums import evaluation_mode

__all__ = ["compute_distillation_loss", "predict_with_teacher", "select_real_tokens"]


def compute_distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float, classes: Sequence[int] | None = None
) -> Tensor:
    """Return T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over rows of logits [n, classes].

    Only ``classes`` take part, those that the teacher has learned; None for all. T^2 keeps the size of gradients.
    """
    if classes is not None:
        student, teacher = student[:, list(classes)], teacher[:, list(classes)]
    student_log, teacher_log = (
        (logits.float() / temperature).log_softmax(-1) for logits in (student, teacher.detach())
    )
    return temperature**2 * F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)


@torch.no_grad()
def predict_with_teacher(model: nn.Module, tensors: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Return the logits of the model with ``tensors`` in place of its own, without dropout; the base is shared."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    with evaluation_mode(model), use_autocast(model):
        logits: Tensor = functional_call(model, dict(tensors), (), inputs).logits
    return logits


def select_real_tokens(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return logits as rows [n, classes]: one for each example, or one for each token that is no padding."""
    if logits.dim() == 2:
        return logits
    mask = batch.get("attention_mask")
    rows = logits.flatten(0, -2)
    return rows if mask is None or mask.shape != logits.shape[:-1] else rows[mask.flatten().bool()]
