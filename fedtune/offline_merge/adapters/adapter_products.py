"""The products B A of several adapters, by module: read in rows, or as small cores in common bases.

Let Q1 and Q2 be orthonormal bases of all adapters' columns and rows. Then D_i = Q1 M_i Q2. The cores M_i have the same
lengths and angles as the products D_i, and their sides are at most the sum of the ranks.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.errors import ModelError
from fedtune.merging import MergeInput, Shape
from fedtune.merging._low_rank_factors import LowRankFactors
from fedtune.offline_merge.adapters.lora_adapter import LoraAdapterReader

__all__ = ["Products"]


class _Bases(NamedTuple):
    """Q1 [d, R], Q2 [R, k], and the factors of each adapter's core."""

    q1: Tensor
    q2: Tensor
    cores: list[LowRankFactors]


class _Reader(NamedTuple):
    """Rows of one adapter's product, or of its core, by module."""

    products: "Products"
    place: int

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        return self.products.read_module(name)[self.place].compute_rows(start, stop).float()


class Products:
    """The tensors that merge steps read. With ``small``, these are the cores. Only one module is in memory."""

    def __init__(self, adapters: Sequence[LoraAdapterReader], small: bool) -> None:
        self._adapters, self._small = adapters, small
        self._read = lru_cache(1)(self._factors)
        self._bases = lru_cache(1)(self._between)

    def build_adapter_inputs(
        self, weights: Sequence[float], overrides: Sequence[Mapping[str, float]]
    ) -> list[MergeInput]:
        """Return one merge input per adapter."""
        each = enumerate(zip(weights, overrides, strict=True))
        return [MergeInput(_Reader(self, place), weight, own) for place, (weight, own) in each]

    def read_module(self, module: str) -> list[LowRankFactors]:
        """Return the product or the core of each adapter."""
        return self._bases(module).cores if self._small else self._read(module)

    def shape(self, module: str) -> Shape:
        """Return the shape of the product or the core."""
        one = self.read_module(module)[0]
        return len(one.b), one.a.shape[1]

    def scale(self, module: str) -> float:
        """Return the scale of the first adapter that has the module."""
        return next((one.scale for one in self._read(module) if one.rank), 1.0)

    def expand_core(self, module: str, factors: LowRankFactors) -> LowRankFactors:
        """Turn factors of a product or core into factors of the product."""
        if not self._small:
            return factors
        q1, q2, _ = self._bases(module)
        return factors._replace(b=q1 @ factors.b, a=factors.a @ q2)

    def _factors(self, module: str) -> list[LowRankFactors]:
        """Return the factors of every adapter; of rank zero if it lacks the module."""
        found = {number: one.read_factors(module) for number, one in enumerate(self._adapters) if module in one.modules}
        first = next(iter(found.values()))
        for number, one in found.items():
            if (len(one.b), one.a.shape[1]) != (len(first.b), first.a.shape[1]):
                folder = self._adapters[number].folder
                raise ModelError(
                    f"{folder} changes {module} in another shape than the others; give adapters of one base"
                )
        nothing = LowRankFactors(first.b[:, :0], first.a[:0])
        return [found.get(number, nothing) for number in range(len(self._adapters))]

    def _between(self, module: str) -> _Bases:
        factors = self._read(module)
        q1 = torch.linalg.qr(torch.cat([one.b.double() for one in factors], 1))[0]
        q2 = torch.linalg.qr(torch.cat([one.a.double() for one in factors]).T)[0].T
        return _Bases(
            q1, q2, [LowRankFactors(q1.T @ one.b.double(), one.a.double() @ q2.T, one.scale) for one in factors]
        )
