"""What an initialisation method takes out of the base. LoRA takes nothing, but some other methods do.

PiSSA (arXiv 2404.02948, equations 2 to 4) starts from the largest singular values of a weight, OLoRA (arXiv 2406.01775,
section 3) from the first columns of its QR factors. Both train beside the rest of the weight. PEFT subtracts the same
part again when it loads such an adapter, and so does this module.
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
    """Return the initialisation method; ModelError if the adapter does not say what it took out of the base."""
    name = str(start).lower()
    if name in (*RESIDUAL, *_WHOLE):
        return name
    why = "was drawn at random" if name.startswith("pissa_niter") else "depends on more than the adapter and the base"
    raise ModelError(f"{origin} has init_lora_weights {start}, which changed the base by what {why}; {_CONVERT}")


def taken_out(start: str, weight: Tensor, rank: int, scale: float) -> LowRankFactors:
    """Return what was taken out of a weight [out, in] in fp32, as factors of ``rank``."""
    if start == "olora":
        q, r = torch.linalg.qr(weight)
        return LowRankFactors(q[:, :rank], r[:rank], scale)
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    return LowRankFactors(u[:, :rank] * values[:rank], v[:rank])
