"""Counts the floating-point operations of matrix products, convolutions and attention."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

__all__ = ["count_flops"]


def count_flops(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the operations of one call; 0 for all but products, which take nearly all the time of a step."""
    packet = getattr(func, "_overloadpacket", None)
    name = getattr(packet, "__name__", "")
    if name in _ATTENTION:
        return _ATTENTION[name] * _count_attention(args)
    if name == "gemm_4bit":  # x [..., k] by packed weights of the shape [n, k]
        return 2 * int(args[0].numel()) * int(args[2][0])
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


_ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": 4,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 10,
}
"""Multiplications and additions per pair of tokens and number of a head: two products forwards, five backwards."""


def _count_attention(args: tuple[Any, ...]) -> int:
    """The pairs of queries [b, h, s, d] and keys [b, h, t, d], times d. A gradient comes before them."""
    query, key = [one for one in args if isinstance(one, Tensor) and one.dim() == 4][-3:-1] or args[:2]
    batch, heads, tokens, width = query.shape
    return int(batch * heads * tokens * key.shape[-2] * width)
