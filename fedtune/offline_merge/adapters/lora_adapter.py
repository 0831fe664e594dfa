"""Read the folder of a PEFT LoRA adapter: the factors of each module, and its other tensors.

Scales are alpha / r, or alpha / sqrt(r) for rsLoRA. Patterns may give a module its own rank and alpha.
"""

import math
import re
from collections.abc import Mapping, Set
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedtune.errors import ModelError, SourceError
from fedtune.merging._low_rank_factors import LowRankFactors
from fedtune.offline_merge.adapters.adapter_settings import check_adapter
from fedtune.offline_merge.adapters.initial_adapters import check_start
from fedtune.offline_merge.json_file import read_json
from fedtune.offline_merge.readers.safetensors_folder import convert_to_fp32

__all__ = ["CONFIG", "TENSORS", "FactorNames", "LoraAdapterReader", "strip_peft_prefix"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_INSIDE = "base_model.model."
_FACTOR = re.compile(r"^(?P<owner>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(\.weight)?$")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.weight)?$")


class FactorNames(NamedTuple):
    """The names of a module's factors in the file. For an embedding, they are those of the transposed weight."""

    a: str
    b: str
    embedding: bool


class LoraAdapterReader:
    """One adapter. Factors are read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / CONFIG)
        check_adapter(folder, self.config)
        self.start = check_start(self.config.get("init_lora_weights", True), str(folder))

    @cached_property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the file."""
        path = self.folder / TENSORS
        if not path.is_file():
            raise SourceError(f"{self.folder} has no {TENSORS}; save it with safetensors")
        try:
            with safe_open(path, "pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise SourceError(f"{path} cannot be read ({error}); fetch it again") from error
        if not found:
            raise SourceError(f"{path} holds no tensor; train or fetch it again")
        return found

    @cached_property
    def modules(self) -> dict[str, FactorNames]:
        """The names of the factors, by the module's name in the base."""
        found: dict[str, dict[str, str]] = {}
        embeddings = set()
        for name in self.tensor_shapes:
            if (match := _FACTOR.match(name)) is not None:
                found.setdefault(match["owner"], {})[match["factor"]] = name
                embeddings |= {match["owner"]} if match["embedding"] else set()
        for owner, names in found.items():
            self._check(owner, names)
        self._check_magnitudes(set(found))
        return {
            strip_peft_prefix(own): FactorNames(names["A"], names["B"], own in embeddings)
            for own, names in found.items()
        }

    @cached_property
    def extra_tensors(self) -> list[str]:
        """Names of tensors that are not factors: magnitudes, biases, heads."""
        names = [name for name in self.tensor_shapes if not _FACTOR.match(name)]
        odd = [name for name in names if ".lora_" in name and not _MAGNITUDE.search(name)]
        if odd:
            raise ModelError(f"{self.folder} holds {odd[0]}, which is no LoRA factor; fold it with peft")
        return names

    def read_tensor(self, name: str) -> Tensor:
        """Return a tensor as it is stored; ModelError if its values are not finite."""
        with safe_open(self.folder / TENSORS, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if not bool(convert_to_fp32(tensor).isfinite().all()):
            raise ModelError(f"{self.folder} holds values that are not finite in {name}; train or fetch it again")
        return tensor

    def read_factors(self, module: str) -> LowRankFactors:
        """Return B [d, r], A [r, k] and the scale. The further dimensions of a kernel count as columns."""
        place = self.modules[module]
        a, b = self.read_tensor(place.a).flatten(1), self.read_tensor(place.b).flatten(1)
        return LowRankFactors(b, a, self.compute_scale(module, len(a)))

    def compute_scale(self, module: str, rank: int) -> float:
        """Return the factor that multiplies a module's product."""
        alpha = self._said("alpha_pattern", "lora_alpha", module)
        if alpha is None:
            raise ModelError(f"{self.folder} does not say lora_alpha, which scales its products; fetch {CONFIG} again")
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank) if rank else 1.0

    def _said(self, patterns: str, key: str, module: str) -> float | None:
        """A number of the configuration for one module: by a pattern, or else for all."""
        own = self.config.get(patterns) or {}
        try:
            found = own.get(get_pattern_key(list(own), module), self.config.get(key))
        except (AttributeError, re.error) as error:
            raise SourceError(
                f"{self.folder} has {patterns} {own}, which is no pattern; fetch {CONFIG} again"
            ) from error
        if found is None or (isinstance(found, int | float) and math.isfinite(found)):
            return found
        raise SourceError(f"{self.folder} has {found!r} as {key} of {module}, which is no number; fetch {CONFIG} again")

    def read_setting(self, name: str) -> Any:
        """Return a value of the configuration, or None."""
        return self.config.get(name) or None

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the factors."""
        return self.read_tensor(next(iter(self.modules.values())).a).dtype if self.modules else torch.float32

    def _check(self, owner: str, names: Mapping[str, str]) -> None:
        if names.keys() != {"A", "B"}:
            raise SourceError(
                f"{self.folder} has only factor {next(iter(names))} of {strip_peft_prefix(owner)}; fetch it again"
            )
        self._check_shapes(strip_peft_prefix(owner), self.tensor_shapes[names["A"]], self.tensor_shapes[names["B"]])

    def _check_shapes(self, module: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        """Raise SourceError if a factor is missing, ModelError if the factors do not fit each other or the rank."""
        if not all((*a, *b)) or min(len(a), len(b)) < 2:
            raise SourceError(
                f"{self.folder} holds an empty factor of {module}, as when each process saves its own part; save it "
                "again from all of them"
            )
        if a[0] != b[1]:
            raise ModelError(f"{self.folder} has factors of {module} that do not multiply; fold it with peft")
        rank = self._said("rank_pattern", "r", module)
        if rank is not None and a[0] != rank:
            raise ModelError(
                f"{self.folder} holds factors of rank {a[0]} for {module}, but says {rank:g}, on which its scale "
                "depends; fetch both files again"
            )

    def _check_magnitudes(self, owners: Set[str]) -> None:
        """Raise SourceError unless all modules have magnitudes, or none, as use_dora says."""
        having = {_MAGNITUDE.sub("", name) for name in self.tensor_shapes if _MAGNITUDE.search(name)}
        wanted = owners if self.read_setting("use_dora") else set()
        if odd := sorted(having ^ wanted):
            says, has = ("has", "none") if odd[0] in wanted else ("has no", "some")
            raise SourceError(
                f"{self.folder} {says} use_dora and {has} of its magnitudes for {strip_peft_prefix(odd[0])}; "
                "fetch it again"
            )


def strip_peft_prefix(owner: str) -> str:
    """Return a module's name in the base."""
    return owner.removeprefix(_INSIDE)
