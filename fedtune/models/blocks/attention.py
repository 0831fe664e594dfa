"""Attention by torch's fused kernel, and its masks, as transformers makes them for ``sdpa``."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["AttentionSettings", "compute_attention", "make_causal_mask", "make_padding_mask"]


class AttentionSettings(NamedTuple):
    """How heads attend. ``groups`` query heads share a head of keys and values."""

    scaling: float
    groups: int = 1
    is_causal: bool = False


def compute_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: AttentionSettings, dropout: float
) -> Tensor:
    """Attend with heads [b, heads, n, size] under a mask [b, 1, n, n]: True where a query sees a key.

    Returns [b, n, heads * size]. Without a mask, a query sees all keys, or if it is causal those up to its own.
    """
    shares_keys = settings.groups > 1
    if shares_keys and (mask is not None or key.shape[-1] > _LARGEST_SHARED_HEAD):
        key, value = _repeat_heads(key, settings.groups), _repeat_heads(value, settings.groups)
        shares_keys = False
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=settings.is_causal and mask is None and query.shape[2] > 1,
        scale=settings.scaling,
        enable_gqa=shares_keys,
    )
    return out.transpose(1, 2).contiguous().flatten(2)


_LARGEST_SHARED_HEAD = 256
"""Larger heads of keys are copied for each query head."""


def _repeat_heads(heads: Tensor, times: int) -> Tensor:
    batch, count, length, size = heads.shape
    return heads[:, :, None].expand(batch, count, times, length, size).reshape(batch, count * times, length, size)


def make_padding_mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Return the mask [b, 1, n, n] of an encoder from ones and zeros [b, n]; None if no token is padding."""
    if attention_mask is None or (present := attention_mask.bool()).all():
        return None
    return present[:, None, None, :].expand(-1, 1, length, -1).contiguous()


def make_causal_mask(
    attention_mask: Tensor | None, position_ids: Tensor, batch: int, window: int | None
) -> Tensor | None:
    """Return the mask [b, 1, n, n] of a decoder; None if causality alone hides keys.

    With a ``window``, a query sees as many keys at most. Where positions [b, n] restart and no padding is given, texts
    are packed in a row: they do not see each other.
    """
    length = position_ids.shape[1]
    texts = _number_texts(position_ids.expand(batch, -1)) if attention_mask is None else None
    present = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
    if texts is None and present is None and (window is None or length < window):
        return None
    at = torch.arange(length, device=position_ids.device)[None] if texts is None else position_ids.expand(batch, -1)
    seen = at[:, None, :] <= at[:, :, None]
    if window is not None:
        seen = seen & (at[:, None, :] > at[:, :, None] - window)
    if texts is not None:
        seen = seen & (texts[:, None, :] == texts[:, :, None])
    if present is not None:
        seen = seen & present[:, None, :]
    return seen.expand(batch, -1, -1).contiguous()[:, None]


def _number_texts(position_ids: Tensor) -> Tensor | None:
    """The number [b, n] of the text that each position belongs to; None if no row has two texts."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    numbers = (steps != 1).cumsum(-1)
    return numbers if bool((numbers[:, -1] != 0).any()) else None
