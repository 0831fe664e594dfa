"""What an adapter's first step took out of the base: LoRA's own starting points leave it whole, some others do not.

PiSSA (arXiv 2404.02948, equations 2 to 4) starts from the largest singular values of a weight, OLoRA (arXiv 2406.01775,
section 3) from the first columns of its QR factors; both train beside what is left of the weight. PEFT takes the same
part away again when it loads such an adapter, and so does this.
"""

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.merging._low_rank_factors import LowRankFactors

__all__ = ["RESIDUAL", "check_start", "taken_out"]

RESIDUAL = ("pissa", "olora")
_WHOLE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_CONVERT = "convert it with peft's path_initial_model_for_weight_conversion"


def check_start(start: object, origin: str) -> str:
    """The starting point by its name; ModelError for one whose part of the base the adapter does not tell."""
    name = str(start).lower()
    if name in (*RESIDUAL, *_WHOLE):
        return name
    why = "was drawn at random" if name.startswith("pissa_niter") else "depends on more than the adapter and the base"
    raise ModelError(f"{origin} has init_lora_weights {start}, which changed the base by what {why}; {_CONVERT}")


def taken_out(start: str, weight: Tensor, rank: int, scale: float) -> LowRankFactors:
    """What was taken out of a weight [out, in] of fp32, as factors of ``rank``."""
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return LowRankFactors(q[:, :rank], r[:rank], scale)
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    return LowRankFactors(u[:, :rank] * values[:rank], v[:rank])
