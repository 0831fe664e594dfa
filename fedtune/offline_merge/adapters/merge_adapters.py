"""Merge LoRA adapters by their products B A, never by A and B separately.

Steps that need only inner products of the products (linear, SLERP, Karcher, Model Stock, geometric median ...) run on
small cores with the same lengths and angles. Steps that look at single entries (TIES, DARE) read rows of the products;
one dense module at a time is merged and truncated by SVD. DoRA magnitudes, biases and heads are not products: each is
averaged by weight over the adapters that have it. The effect of DoRA's magnitudes depends on the base.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fedtune.errors import ModelError, RecipeError, StoreError
from fedtune.merging import CombineStep, MergeContext, RelaxStep, bind_combine
from fedtune.merging._factor_svd import TruncatedProduct, truncate_matrix
from fedtune.merging._low_rank_factors import LowRankFactors, pad_factors
from fedtune.merging.combine.linear_combinations._gram_step import GramCombineStep
from fedtune.merging.combine.linear_combinations.linear import Linear
from fedtune.merging.combine.low_rank._low_rank_pair_step import LowRankPairCombineStep
from fedtune.offline_merge.adapters.adapter_products import Products
from fedtune.offline_merge.adapters.adapter_tokenizers import common_tokens
from fedtune.offline_merge.adapters.initial_adapters import RESIDUAL
from fedtune.offline_merge.adapters.lora_adapter import LoraAdapterReader
from fedtune.offline_merge.adapters.write_adapter import cast, write_adapter

__all__ = ["MergedModule", "RankLimit", "compute_overall_error", "merge_adapters"]

_AGREE = ("fan_in_fan_out", "use_dora", "task_type")


class RankLimit(NamedTuple):
    """How small a merged module is made: at most ``rank``, or keeping a share ``energy`` of its squared norm, or both.

    With neither all is kept, and ranks add up as far as adapters differ.
    """

    rank: int | None = None
    energy: float | None = None


class MergedModule(NamedTuple):
    """A module of the result: its rank, and the Frobenius norms of what it misses and of the whole.

    ``missed`` is NaN where only the base could tell it and is not at hand.
    """

    module: str
    rank: int
    missed: float
    whole: float

    @property
    def error(self) -> float:
        """Relative; zero where there is nothing, NaN where it is not known."""
        return self.missed / self.whole if self.missed else 0.0


def compute_overall_error(modules: Sequence[MergedModule]) -> float:
    """Relative, over all modules together; NaN where one is not known."""
    missed = math.hypot(*(one.missed for one in modules))
    return missed / math.hypot(*(one.whole for one in modules)) if missed else 0.0


def merge_adapters(
    folders: Sequence[Path],
    out: Path,
    step: CombineStep | None = None,
    weights: Sequence[float] | None = None,
    cut: RankLimit = RankLimit(),  # noqa: B008 - an immutable value
    relax: Sequence[RelaxStep] = (),
    evidence: MergeContext = MergeContext(),  # noqa: B008 - an immutable value
    knobs: Sequence[Mapping[str, float]] = (),
) -> list[MergedModule]:
    """Merge PEFT LoRA adapters of one base into a new adapter folder; what each module lost is returned.

    ``step`` is linear unless given, ``weights`` are ones, ``knobs`` are fields of the step that single adapters set.
    ``relax`` steps scale the columns of A by the activity of the base's weights.
    """
    step, shares = step or Linear(), [1.0] * len(folders) if weights is None else list(weights)
    if isinstance(step, LowRankPairCombineStep):
        raise RecipeError(f"merge: {step.name} is for rounds of a federation; name linear, ties or another step")
    if out.exists():
        raise StoreError(f"{out} exists already; choose another folder")
    adapters = [LoraAdapterReader(folder) for folder in folders]
    _check_alike(adapters)
    tokens = common_tokens(adapters)
    places = {module: place for one in reversed(adapters) for module, place in one.modules.items()}
    whole = _averaged(adapters, shares)
    modules, factors = [], {}
    parts = _Parts(shares, knobs or [{}] * len(shares))
    for module, made in _merged(adapters, sorted(places), step, parts, cut, evidence):
        relaxed = _relaxed(made.factors, module, adapters, relax, evidence)
        factors[module] = pad_factors(relaxed, max(1, relaxed.rank))
        modules.append(MergedModule(module, factors[module].rank, made.dropped_norm, made.total_norm))
    write_adapter(out, adapters, places, factors, whole, tokens)
    return _with_magnitudes(modules, folders, out, step, parts) if adapters[0].read_setting("use_dora") else modules


class _Parts(NamedTuple):
    """Weights and knobs by adapter."""

    weights: Sequence[float]
    knobs: Sequence[Mapping[str, float]]


def _with_magnitudes(
    modules: Sequence[MergedModule], folders: Sequence[Path], out: Path, step: CombineStep, parts: _Parts
) -> list[MergedModule]:
    """The modules with what they miss as a whole, DoRA's magnitudes included."""
    from fedtune.offline_merge.adapters.dora_error import missed_by_dora

    found = missed_by_dora(folders, out, [one.module for one in modules], step, parts.weights, parts.knobs)
    if found is None:
        return [one._replace(missed=math.nan) for one in modules]
    return [one._replace(**found[one.module]._asdict()) for one in modules]


def _merged(
    adapters: Sequence[LoraAdapterReader],
    modules: Sequence[str],
    step: CombineStep,
    parts: _Parts,
    cut: RankLimit,
    evidence: MergeContext,
) -> Iterator[tuple[str, TruncatedProduct]]:
    """Each module's merged product as it is cut, at the scale of the first adapter that has it."""
    products = Products(adapters, small=isinstance(step, GramCombineStep) and step.coefficient_scope == "tensor")
    shapes = {module: products.shape(module) for module in modules}
    step, operands = bind_combine(step, shapes, products.build_adapter_inputs(parts.weights, parts.knobs), evidence)
    energy = 1.0 if cut == RankLimit() else cut.energy
    for module, shape in shapes.items():
        matrix = torch.cat(list(step.combine(module, shape, operands)))
        made = truncate_matrix(matrix, cut.rank, energy, products.scale(module))
        yield module, made._replace(factors=products.expand_core(module, made.factors))


def _relaxed(
    factors: LowRankFactors,
    module: str,
    adapters: Sequence[LoraAdapterReader],
    relax: Sequence[RelaxStep],
    evidence: MergeContext,
) -> LowRankFactors:
    """A with the columns scaled as steps scale the weight's columns, or rows where the weight is transposed."""
    owner = next(one for one in adapters if module in one.modules)
    place = owner.modules[module]
    flipped = place.embedding or bool(owner.read_setting("fan_in_fan_out"))
    a = factors.a.reshape(factors.rank, *owner.tensor_shapes[place.a][1:])
    for step in relax:
        a = step.relax(f"{module}.weight", 0, a.T if flipped else a, evidence)
        a = a.T if flipped else a
    return factors._replace(a=a.flatten(1))


def _averaged(adapters: Sequence[LoraAdapterReader], weights: Sequence[float]) -> dict[str, Tensor]:
    """Magnitudes, biases and heads: each the mean over the adapters that have it."""
    names = sorted({name for one in adapters for name in one.extra_tensors})
    return {name: _mean(name, adapters, weights) for name in names}


def _mean(name: str, adapters: Sequence[LoraAdapterReader], weights: Sequence[float]) -> Tensor:
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
    """What no merge can bridge, and a module that is an embedding in one adapter alone."""
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
