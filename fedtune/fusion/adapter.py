"""A PEFT adapter read as a whole model: its change is added to the base's rows as they are read.

W' = W + s B A; with DoRA the rows of W' are then scaled to the adapter's magnitudes (arXiv 2402.09353, equation 5).
What an adapter holds whole (heads, biases) takes the place of the base's tensor.
"""

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fedtune.errors import ModelError, SourceError
from fedtune.fusion.adapter_file import CONFIG, TENSORS, AdapterFile, module_of
from fedtune.fusion.folder import as_fp32, read_json
from fedtune.fusion.layout import Form
from fedtune.fusion.weights import Weights, spelt_like
from fedtune.merging._factors import Factors

__all__ = ["Adapted", "base_of"]

_MAGNITUDE = ".lora_magnitude_vector"
_ASIDE = ".original_module."
"""What PEFT keeps of a module that the adapter has its own copy of."""


def base_of(folder: Path) -> str:
    """What an adapter says it was made for: a hub id or a folder."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise SourceError(f"{folder} does not say which base it is for; write it as BASE+{folder}")
    return str(base)


class Adapted(Weights):
    """The base with the adapter's change."""

    def __init__(self, folder: Path, origin: str, base: Weights) -> None:
        self._adapter = AdapterFile(folder)
        self.origin, self.folder, self.quantised = origin, base.folder, base.quantised
        self.files = (*base.files, folder / TENSORS)
        own = dict(sorted((_in_the_base(name), name) for name in self._adapter.whole if _ASIDE not in name))
        self._magnitudes = {name.partition(_MAGNITUDE)[0]: own[name] for name in own if _MAGNITUDE in name}
        self._whole = {name: stored for name, stored in own.items() if _MAGNITUDE not in name}
        self._modules = {f"{module}.weight": module for module in self._adapter.places}
        self._base = spelt_like(base, [*self._modules, *self._whole])
        self.forms = dict(self._base.forms)
        for name, stored in self._whole.items():
            dtype = self._base.forms[name].dtype if name in self._base.forms else self._adapter.dtype
            self.forms[name] = Form(self._adapter.forms[stored], dtype)
        self._factors = lru_cache(1)(self._adapter.factors)
        for name, module in self._modules.items():
            self._check(name, module)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The base's rows with the change."""
        if name not in self._modules:
            return self._before(name, start, stop)
        module = self._modules[name]
        if module in self._magnitudes:
            return self._rescaled(name, module, start, stop)
        return self._moved(name, module, start, stop)

    def _before(self, name: str, start: int, stop: int) -> Tensor:
        """Rows without the product: the adapter's own where it holds the tensor whole, or else the base's."""
        if name not in self._whole:
            return self._base.rows(name, start, stop)
        whole = as_fp32(self._adapter.read(self._whole[name]))
        return whole[start:stop] if whole.dim() else whole

    def _moved(self, name: str, module: str, start: int, stop: int) -> Tensor:
        """Rows of W + s B A, or of W + s (B A)^T where the weight is stored as [in, out]."""
        factors = self._factors(module)
        if self._flipped(module):
            factors = Factors(factors.a.T, factors.b.T, factors.scale)
        rows = self._before(name, start, stop)
        return rows + factors.rows(start, stop).reshape(rows.shape).to(rows.dtype)

    def _rescaled(self, name: str, module: str, start: int, stop: int) -> Tensor:
        magnitude: Tensor = as_fp32(self._adapter.read(self._magnitudes[module])).flatten()
        if self._flipped(module):  # norms run over all rows
            whole = self._moved(name, module, 0, self._base.forms[name].height)
            columns: Tensor = magnitude / torch.linalg.vector_norm(whole, dim=0)
            return whole[start:stop] * columns
        rows = self._moved(name, module, start, stop)
        ratio: Tensor = magnitude[start:stop] / torch.linalg.vector_norm(rows.flatten(1), dim=1)
        return rows * ratio.reshape(-1, *[1] * (rows.dim() - 1))

    def _flipped(self, module: str) -> bool:
        return self._adapter.places[module].embedding or bool(self._adapter.setting("fan_in_fan_out"))

    def _check(self, name: str, module: str) -> None:
        base, origin = self._base, self.origin
        if name not in base.forms:
            raise ModelError(f"{origin} changes {name}, which {base.origin} does not have; name its own base")
        place = self._adapter.places[module]
        if place.embedding and module in self._magnitudes:
            raise ModelError(f"{origin} has DoRA magnitudes for the embedding {module}; fold it with peft")
        a, b = self._adapter.forms[place.a], self._adapter.forms[place.b]
        wanted = [b[0], math.prod(a[1:])]
        found = [base.forms[name].height, math.prod(base.forms[name].shape[1:])]
        if found != (wanted[::-1] if self._flipped(module) else wanted):
            raise ModelError(f"{origin} changes {name} of another shape than {base.origin} has; name its own base")


def _in_the_base(name: str) -> str:
    """The name in the base of what an adapter holds whole; a module's own copy or its base layer is that module."""
    return module_of(name).replace(".modules_to_save.", ".").replace(".base_layer.", ".")
