"""The smooth count of non-zero activations, its gradient, and the exact counts.

Runwal et al. (arXiv 2402.01911) replace the number of non-zeros by the sum of s(a) = a^2 / (a^2 + eps). Here D is its
mean over the units of all counted tokens. The forward pass stores nothing more: the layers around it store all that the
gradient needs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Recompute", "compute_density", "count_nonzero_per_token", "estimate_activation_scale", "sample_magnitudes"]

Recompute = Callable[..., Tensor]
"""Makes an activation again from tensors that are kept anyway."""


def compute_density(
    a: Tensor, eps: float, token_mask: Tensor | None, remake: Recompute | None = None, kept: tuple[Tensor, ...] = ()
) -> tuple[Tensor, Tensor]:
    """``a`` [..., units] unchanged, and D in [0, 1], in fp32 (fp64 for fp64).

    ``token_mask`` [tokens] is true for tokens that count, None if all do. The gradient stores ``a``, or ``kept`` if
    ``remake(*kept)`` recomputes it.
    """
    out: tuple[Tensor, Tensor] = _WithDensity.apply(a, eps, token_mask, remake, *(kept or (a.detach(),)))
    return out


def estimate_activation_scale(product: Tensor, counted: Tensor | None) -> float:
    """The root mean square of |P| clipped at its 99th percentile, from a fixed sample of about 8192 entries."""
    sample = sample_magnitudes(product, counted, 8192)
    clipped = sample.clamp(max=sample.kthvalue(max(1, int(0.99 * len(sample)))).values)
    return float(clipped.square().mean().sqrt())


def sample_magnitudes(a: Tensor, counted: Tensor | None, most: int) -> Tensor:
    """About ``most`` of the |a| of counted tokens, always at the same places: fp32 [n]."""
    rows = _rows(a.detach())
    tokens = torch.arange(len(rows), device=rows.device) if counted is None else counted.nonzero()[:, 0]
    if len(tokens) * rows.shape[1] <= most:
        return rows[tokens].abs().float().flatten()
    # steps of the golden ratio: no period of the batch's length, whose first tokens are outliers
    steps = torch.arange(max(1, most // 512), dtype=torch.float64) * 0.6180339887498949 % 1
    entries = rows[tokens[(steps * len(tokens)).long().to(rows.device)]].abs().float().flatten()
    return entries[:: max(1, len(entries) // most)]


def count_nonzero_per_token(a: Tensor) -> Tensor:
    """Entries per token [tokens] that are not exactly zero; -0.0 is zero."""
    return (_rows(a) != 0).sum(1)


class _WithDensity(torch.autograd.Function):
    """Returns ``a`` too, so that both gradients meet here and are added in one pass."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, eps: float, counted: Tensor | None, remake: Recompute | None, *kept: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.eps, ctx.remake, ctx.counted = eps, remake, counted
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        rows = _rows(a)
        zeros = torch.cat([_smooth_zeros(part, eps) for part in _parts(rows)])
        zeros = zeros if counted is None else zeros[counted]
        ctx.entries = max(1, len(zeros) * rows.shape[1])
        return a, (1 - zeros.sum() / ctx.entries).to(_wide(a.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_a: Tensor | None, of_density: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # checkpointing hands them out once
        others = (None,) * (3 + len(kept))
        if of_density is None:
            return of_a, *others
        a = kept[0] if ctx.remake is None else ctx.remake(*kept)
        before = torch.zeros_like(a) if of_a is None else of_a
        out = torch.empty_like(a, memory_format=torch.contiguous_format)
        weight = 2 * ctx.eps * float(of_density) / ctx.entries
        for part, base, into in zip(_parts(_rows(a)), _parts(_rows(before)), _parts(_rows(out)), strict=True):
            _add_slope(part, base, weight, ctx.eps, into)
        if ctx.counted is not None:
            _rows(out)[~ctx.counted] = _rows(before)[~ctx.counted]
        return out, *others


def _smooth_zeros(part: Tensor, eps: float) -> Tensor:
    """The sum over units of 1 - s(a) = eps / (a^2 + eps), per token, fp64; exactly the units for a = 0."""
    near = _square_plus(part, eps)
    return torch.div(near.new_full((), eps), near, out=near).sum(1).double()


def _add_slope(part: Tensor, base: Tensor, weight: float, eps: float, into: Tensor) -> None:
    """``into`` = ``base`` + ``weight`` a / (a^2 + eps)^2; with 2 eps in the weight this is ds/da."""
    near = _square_plus(part, eps)
    torch.addcdiv(base.to(near.dtype), part.to(near.dtype), near.mul_(near), value=weight, out=into)


def _square_plus(part: Tensor, eps: float) -> Tensor:
    wide = part.to(_wide(part.dtype))
    return torch.addcmul(wide.new_full((), eps), wide, wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Half precision would lose a^2 below 2.4e-4, and eps."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(a: Tensor) -> Tensor:
    return a.reshape(-1, a.shape[-1])


_PART = 2**18
"""Entries handled at a time: their temporaries stay in a core's cache."""


def _parts(rows: Tensor) -> Iterator[Tensor]:
    return iter(rows.split(max(1, _PART // rows.shape[1])))
