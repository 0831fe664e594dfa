"""Read a PEFT adapter as a whole model: its change is added to the base's rows.

W' = W + s B A. With DoRA, the rows of W' are then scaled to the adapter's magnitudes (arXiv 2402.09353, equation 5).
Whole modules in the adapter (heads, biases) replace the base's tensors.
"""

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fedtune.errors import ModelError, SourceError
from fedtune.merging._low_rank_factors import LowRankFactors
from fedtune.offline_merge.adapters.initial_adapters import RESIDUAL, taken_out
from fedtune.offline_merge.adapters.lora_adapter import CONFIG, TENSORS, LoraAdapterReader, strip_peft_prefix
from fedtune.offline_merge.json_file import read_json
from fedtune.offline_merge.readers.model_reader import ModelReader, by_their_rest, match_tensor_names
from fedtune.offline_merge.readers.safetensors_folder import convert_to_fp32
from fedtune.offline_merge.safetensors_layout import TensorInfo
from fedtune.offline_merge.token_tensor_names import is_embedding, is_output, output_of
from fedtune.offline_merge.transposed_weights import is_transposed
from fedtune.offline_merge.vocabularies import has_tokenizer

__all__ = ["AdapterModelReader", "read_base_model_name"]

_MAGNITUDE = ".lora_magnitude_vector"
_BELOW = ".base_layer."
_ASIDE = ".original_module."
"""The names under which PEFT stores modules that the adapter has its own copy of."""


def read_base_model_name(folder: Path) -> str:
    """Return the base that an adapter names: a hub id, with its revision if there is one, or a folder."""
    config = read_json(folder / CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise SourceError(f"{folder} does not say which base it is for; write it as BASE+{folder}")
    return str(base) if revision is None or Path(base).expanduser().exists() else f"{base}@{revision}"


class AdapterModelReader(ModelReader):
    """The base with the adapter's change."""

    def __init__(self, folder: Path, origin: str, base: ModelReader) -> None:
        self._adapter = LoraAdapterReader(folder)
        self.source, self.folder, self.is_quantised = origin, base.folder, base.is_quantised
        self.own_tokens = folder if has_tokenizer(folder) else base.own_tokens
        self.files = (*base.files, folder / TENSORS)
        own = dict(sorted((_in_the_base(name), name) for name in self._adapter.extra_tensors if _ASIDE not in name))
        self._magnitudes = {name.partition(_MAGNITUDE)[0]: own[name] for name in own if _MAGNITUDE in name}
        self._whole = {name: stored for name, stored in own.items() if _MAGNITUDE not in name}
        self._modules = {f"{module}.weight": module for module in self._adapter.modules}
        self._base = match_tensor_names(base, [*self._modules, *self._whole])
        if any(name not in self._base.tensor_infos for name in self._modules):
            self._base = base
            meant = by_their_rest([*self._modules, *self._whole], base.tensor_infos)
            self._modules = {meant.get(name, name): module for name, module in self._modules.items()}
            self._whole = {meant.get(name, name): stored for name, stored in self._whole.items()}
        self._same: dict[str, str] = {}
        self._transposed: dict[str, bool] = {}
        self.tensor_infos = dict(self._base.tensor_infos)
        for name, stored in self._whole.items():
            dtype = self._base.tensor_infos[name].dtype if name in self._base.tensor_infos else self._adapter.dtype
            self.tensor_infos[name] = TensorInfo(self._adapter.tensor_shapes[stored], dtype)
        self._untie()
        self._factors, self._taken = lru_cache(1)(self._adapter.read_factors), lru_cache(1)(self._taken_out)
        for name, module in self._modules.items():
            self._check(name, module)
        self._check_rows()

    @property
    def base(self) -> ModelReader:
        """The base, under the adapter's names."""
        return self._base

    def weight_of(self, module: str) -> str:
        """Return the name of the weight that a product of the adapter changes."""
        return next(name for name, own in self._modules.items() if own == module)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the base's rows with the change."""
        if name not in self._modules:
            return self._before(name, start, stop)
        module = self._modules[name]
        if module in self._magnitudes:
            return self._rescaled(name, module, start, stop)
        return self._moved(name, module, start, stop)

    def _before(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows without the product: the adapter's own if it has the whole tensor, or the base's."""
        if name not in self._whole:
            return self._left(name, start, stop)
        whole = convert_to_fp32(self._adapter.read_tensor(self._whole[name]))
        return whole[start:stop] if whole.dim() else whole

    def _left(self, name: str, start: int, stop: int) -> Tensor:
        """Return the base's rows without what the adapter's initialisation took out of them."""
        rows = self._base.rows(self._same.get(name, name), start, stop)
        if self._adapter.start not in RESIDUAL or name not in self._modules:
            return rows
        left = rows.double() - self._taken(name).compute_rows(start, stop)
        return left.to(self.tensor_infos[name].dtype).to(rows.dtype)  # rounded once, as PEFT keeps it

    def _taken_out(self, name: str) -> LowRankFactors:
        """Return what was taken out of a weight, with the weight's own axes."""
        weight, module = self._base.whole(self._same.get(name, name)), self._modules[name]
        rank = self._adapter.tensor_shapes[self._adapter.modules[module].a][0]
        flipped = self._flipped(module)
        scale = self._adapter.compute_scale(module, rank)
        found = taken_out(self._adapter.start, weight.T if flipped else weight, rank, scale)
        return LowRankFactors(found.a.T, found.b.T, found.scale) if flipped else found

    def _untie(self) -> None:
        """Give the model a separate output embedding if the base ties it and the adapter changes one of the two.

        PEFT does the same: a module's own copy, or a change beside a module, does not affect the other module.
        """
        output = output_of(self.folder)
        inputs = [name for name in self._base.tensor_infos if is_embedding(name)]
        tied = bool(read_json(self.folder / "config.json").get("tie_word_embeddings", True))
        if output is None or output in self.tensor_infos or not inputs or not tied:
            return
        apart = self._has_its_own(inputs[0]) and not self._adapter.read_setting("ensure_weight_tying")
        stored = self._whole.get(inputs[0], "")
        if apart and _BELOW in stored:  # rows for more tokens, which the output has too
            self._whole[output] = stored
            self.tensor_infos = {**self.tensor_infos, output: self.tensor_infos[inputs[0]]}
        elif apart or output in self._modules:
            self._same[output] = inputs[0]
            self.tensor_infos = {**self.tensor_infos, output: self._base.tensor_infos[inputs[0]]}

    def _has_its_own(self, name: str) -> bool:
        """Whether the adapter has its own copy of a tensor."""
        module = name.removesuffix(".weight")
        copied = self._adapter.read_setting("modules_to_save") or ()
        return name in self._modules or (name in self._whole and module.rpartition(".")[2] in copied)

    def _moved(self, name: str, module: str, start: int, stop: int) -> Tensor:
        """Return rows of W + s B A, or of W + s (B A)^T if the weight is stored as [in, out]."""
        factors = self._factors(module)
        if self._flipped(module):
            factors = LowRankFactors(factors.a.T, factors.b.T, factors.scale)
        rows = self._before(name, start, stop)
        return rows + factors.compute_rows(start, stop).reshape(rows.shape).to(rows.dtype)

    def _rescaled(self, name: str, module: str, start: int, stop: int) -> Tensor:
        magnitude: Tensor = convert_to_fp32(self._adapter.read_tensor(self._magnitudes[module])).flatten()
        if self._flipped(module):  # norms run over all rows
            whole = self._moved(name, module, 0, self.tensor_infos[name].num_rows)
            columns: Tensor = magnitude / torch.linalg.vector_norm(whole, dim=0)
            return whole[start:stop] * columns
        rows = self._moved(name, module, start, stop)
        ratio: Tensor = magnitude[start:stop] / torch.linalg.vector_norm(rows.flatten(1), dim=1)
        return rows * ratio.reshape(-1, *[1] * (rows.dim() - 1))

    def _flipped(self, module: str) -> bool:
        if module not in self._transposed:
            said = bool(self._adapter.read_setting("fan_in_fan_out"))
            place = self._adapter.modules[module]
            self._transposed[module] = place.embedding or is_transposed(self.folder, module, said)
        return self._transposed[module]

    def _check_rows(self) -> None:
        """Raise ModelError if the adapter's input and output embeddings have different numbers of tokens."""
        heights = {
            name: form.num_rows for name, form in self.tensor_infos.items() if is_embedding(name) or is_output(name)
        }
        if any(name in self._whole for name in heights) and len(set(heights.values())) > 1:
            told = ", ".join(f"{height} in {name}" for name, height in heights.items())
            raise ModelError(
                f"{self.source} has another number of tokens in one layer than in another ({told}); save the adapter "
                "with both (modules_to_save)"
            )

    def _check(self, name: str, module: str) -> None:
        base, origin = self._base, self.source
        if name not in self.tensor_infos:
            raise ModelError(f"{origin} changes {name}, which {base.source} does not have; name its own base")
        place = self._adapter.modules[module]
        if self._adapter.start in RESIDUAL and (
            place.embedding or len(self.tensor_infos[name].shape) != 2 or base.is_quantised
        ):
            raise ModelError(
                f"{origin} has init_lora_weights {self._adapter.start} on {module}, which starts only from linear "
                "weights that are not quantised; name its own base"
            )
        if place.embedding and module in self._magnitudes:
            raise ModelError(f"{origin} has DoRA magnitudes for the embedding {module}; fold it with peft")
        a, b = self._adapter.tensor_shapes[place.a], self._adapter.tensor_shapes[place.b]
        wanted = [b[0], math.prod(a[1:])]
        found = [self.tensor_infos[name].num_rows, math.prod(self.tensor_infos[name].shape[1:])]
        if found != (wanted[::-1] if self._flipped(module) else wanted):
            raise ModelError(f"{origin} changes {name} of another shape than {base.source} has; name its own base")


def _in_the_base(name: str) -> str:
    """Return the base's name for a whole tensor of the adapter. A module's copy or base layer is that module."""
    return strip_peft_prefix(name).replace(".modules_to_save.", ".").replace(_BELOW, ".")
