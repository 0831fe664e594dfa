"""Rotary position embeddings (Su et al., arXiv 2104.09864), plain and with two kinds of scaled frequencies."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["RotaryEmbedding", "RotarySettings", "rotate_heads"]


@dataclass(frozen=True)
class RotarySettings:
    """The base of the frequencies, the size of a head, and how frequencies are scaled.

    ``kind`` is transformers' ``rope_type``: default, linear or llama3.
    """

    theta: float
    head_size: int
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def compute_frequencies(self) -> Tensor:
        """Return the angle [head_size / 2] by which a pair of numbers turns per position, on the CPU."""
        exponents = torch.arange(0, self.head_size, 2, dtype=torch.float, device="cpu") / self.head_size
        plain = 1.0 / (self.theta**exponents)
        if self.kind == "linear":
            return plain / self.factor
        return self._scale_low_frequencies(plain) if self.kind == "llama3" else plain

    def _scale_low_frequencies(self, plain: Tensor) -> Tensor:
        """Divide low frequencies by the factor, keep high ones, and pass from one to the other between them."""
        low_length = self.original_positions / self.low_freq_factor
        high_length = self.original_positions / self.high_freq_factor
        length = 2 * math.pi / plain
        scaled = torch.where(length > low_length, plain / self.factor, plain)
        share = self.original_positions / length - self.low_freq_factor
        share = share / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - share) * scaled / self.factor + share * scaled
        is_between = ~(length < high_length) * ~(length > low_length)
        return torch.where(is_between, between, scaled)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the angles of positions."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, settings: RotarySettings) -> None:
        super().__init__()
        self.rope_type = settings.kind
        frequencies = settings.compute_frequencies()
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [b, n] -> cosines and sines [b, n, head_size] in the type of ``x``."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)


def rotate_heads(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn the pairs of numbers of heads [b, heads, n, size] by the angles of their positions."""
    first, second = heads[..., : heads.shape[-1] // 2], heads[..., heads.shape[-1] // 2 :]
    return (heads * cosines[:, None]) + (torch.cat((-second, first), dim=-1) * sines[:, None])
