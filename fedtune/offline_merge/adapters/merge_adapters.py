"""Merge LoRA adapters by their products B A, never by A and B separately.

Steps that need only inner products of the products (linear, SLERP, Karcher, Model Stock, geometric median ...) run on
small cores with the same lengths and angles. Steps that look at single entries (TIES, DARE) read rows of the products;
one dense module at a time is merged and truncated by SVD. DoRA magnitudes, biases and heads are not products: each is
averaged by weight over the adapters that have it. The effect of DoRA's magnitudes depends on the base.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.errors import ModelError, RecipeError, StoreError
from fedtune.merging import bind_combine
from fedtune.merging._factor_svd import TruncatedProduct, truncate_matrix
from fedtune.merging._low_rank_factors import LowRankFactors, pad_factors
from fedtune.merging.combine.linear_combinations._gram_step import GramCombineStep
from fedtune.merging.combine.low_rank._low_rank_pair_step import LowRankPairCombineStep
from fedtune.offline_merge.adapters.adapter_merge import AdapterMerge, RankLimit
from fedtune.offline_merge.adapters.adapter_products import Products
from fedtune.offline_merge.adapters.adapter_tokenizers import common_tokens
from fedtune.offline_merge.adapters.initial_adapters import RESIDUAL
from fedtune.offline_merge.adapters.lora_adapter import LoraAdapterReader
from fedtune.offline_merge.adapters.write_adapter import cast, write_adapter

__all__ = ["MergedModule", "compute_overall_error", "merge_adapters"]

_AGREE = ("fan_in_fan_out", "use_dora", "task_type")


class MergedModule(NamedTuple):
    """A module of the result: its rank, the Frobenius norm of its error, and that of the exact product.

    ``missed`` is NaN if it depends on a base model that is not available.
    """

    module: str
    rank: int
    missed: float
    whole: float

    @property
    def error(self) -> float:
        """The relative error; NaN if it is unknown."""
        return self.missed / self.whole if self.missed else 0.0


def compute_overall_error(modules: Sequence[MergedModule]) -> float:
    """Return the relative error over all modules; NaN if one is unknown."""
    missed = math.hypot(*(one.missed for one in modules))
    return missed / math.hypot(*(one.whole for one in modules)) if missed else 0.0


def merge_adapters(
    folders: Sequence[Path],
    out: Path,
    merge: AdapterMerge = AdapterMerge(),  # noqa: B008 - an immutable value
) -> list[MergedModule]:
    """Merge PEFT LoRA adapters of one base into a new adapter folder, and return what each module lost."""
    merge = merge.for_adapters(len(folders))
    if isinstance(merge.step, LowRankPairCombineStep):
        raise RecipeError(f"merge: {merge.step.name} is for rounds of a federation; name linear, ties or another step")
    if out.exists():
        raise StoreError(f"{out} exists already; choose another folder")
    adapters = [LoraAdapterReader(folder) for folder in folders]
    _check_alike(adapters)
    tokens = common_tokens(adapters)
    places = {module: place for one in reversed(adapters) for module, place in one.modules.items()}
    whole = _average_extra_tensors(adapters, merge.weights)
    modules, factors = [], {}
    for module, product in _merge_products(adapters, sorted(places), merge):
        relaxed = _relax_factors(product.factors, module, adapters, merge)
        factors[module] = pad_factors(relaxed, max(1, relaxed.rank))
        modules.append(MergedModule(module, factors[module].rank, product.dropped_norm, product.total_norm))
    write_adapter(out, adapters, places, factors, whole, tokens)
    return _add_magnitude_errors(modules, folders, out, merge) if adapters[0].read_setting("use_dora") else modules


def _add_magnitude_errors(
    modules: Sequence[MergedModule], folders: Sequence[Path], out: Path, merge: AdapterMerge
) -> list[MergedModule]:
    """Return the modules with the errors of whole weights, which include DoRA's magnitudes."""
    from fedtune.offline_merge.adapters.dora_error import compute_dora_errors

    found = compute_dora_errors(folders, out, [one.module for one in modules], merge)
    if found is None:
        return [one._replace(missed=math.nan) for one in modules]
    return [one._replace(**found[one.module]._asdict()) for one in modules]


def _merge_products(
    adapters: Sequence[LoraAdapterReader], modules: Sequence[str], merge: AdapterMerge
) -> Iterator[tuple[str, TruncatedProduct]]:
    """Yield the truncated product of each module, at the scale of the first adapter that has the module."""
    small = isinstance(merge.step, GramCombineStep) and merge.step.coefficient_scope == "tensor"
    products = Products(adapters, small=small)
    shapes = {module: products.shape(module) for module in modules}
    each = products.build_adapter_inputs(merge.weights, merge.overrides)
    step, inputs = bind_combine(merge.step, shapes, each, merge.context)
    energy = 1.0 if merge.limit == RankLimit() else merge.limit.energy
    for module, shape in shapes.items():
        matrix = torch.cat(list(step.combine(module, shape, inputs)))
        product = truncate_matrix(matrix, merge.limit.rank, energy, products.scale(module))
        yield module, product._replace(factors=products.expand_core(module, product.factors))


def _relax_factors(
    factors: LowRankFactors, module: str, adapters: Sequence[LoraAdapterReader], merge: AdapterMerge
) -> LowRankFactors:
    """Scale the columns of A as the steps scale the weight's columns; its rows where the weight is transposed."""
    owner = next(one for one in adapters if module in one.modules)
    place = owner.modules[module]
    flipped = place.embedding or bool(owner.read_setting("fan_in_fan_out"))
    a = factors.a.reshape(factors.rank, *owner.tensor_shapes[place.a][1:])
    for step in merge.relax:
        a = step.relax(f"{module}.weight", 0, a.T if flipped else a, merge.context)
        a = a.T if flipped else a
    return factors._replace(a=a.flatten(1))


def _average_extra_tensors(adapters: Sequence[LoraAdapterReader], weights: Sequence[float]) -> dict[str, Tensor]:
    """Average magnitudes, biases and heads, each over the adapters that have it."""
    names = sorted({name for one in adapters for name in one.extra_tensors})
    return {name: _average_tensor(name, adapters, weights) for name in names}


def _average_tensor(name: str, adapters: Sequence[LoraAdapterReader], weights: Sequence[float]) -> Tensor:
    having = [(one, weight) for one, weight in zip(adapters, weights, strict=True) if name in one.tensor_shapes]
    shapes = {one.tensor_shapes[name] for one, _ in having}
    if len(shapes) > 1:
        raise ModelError(f"{name} has shapes {sorted(shapes)} in the adapters; only heads of one shape are averaged")
    total = sum(weight for _, weight in having)
    if total == 0:
        raise RecipeError(f"merge: the weights of the adapters that have {name} sum to zero; change one of them")
    first = having[0][0].read_tensor(name)
    mean = torch.zeros(first.shape, dtype=torch.float64)
    for one, weight in having:
        mean += one.read_tensor(name).double() * (weight / total)
    return cast(name, mean, first.dtype)


def _check_alike(adapters: Sequence[LoraAdapterReader]) -> None:
    """Raise ModelError for adapters that cannot be merged into one adapter."""
    first, *others = adapters
    for one in adapters:
        if one.start in RESIDUAL:
            raise ModelError(
                f"{one.folder} stands beside a base of which {one.start} took a part away (init_lora_weights), as no "
                "other adapter does; merge them as models, or convert it with peft's "
                "path_initial_model_for_weight_conversion"
            )
    for other in others:
        for key in _AGREE:
            if first.read_setting(key) != other.read_setting(key):
                raise ModelError(
                    f"{other.folder} has {key} {other.read_setting(key)}, but {first.folder} {first.read_setting(key)}"
                    "; give adapters of one kind"
                )
    kinds: dict[str, tuple[bool, Path]] = {}
    for one in adapters:
        for module, place in one.modules.items():
            embedding, folder = kinds.setdefault(module, (place.embedding, one.folder))
            if embedding != place.embedding:
                raise ModelError(
                    f"{module} is an embedding in {folder if embedding else one.folder} and none in "
                    f"{one.folder if embedding else folder}; give adapters of one base"
                )
