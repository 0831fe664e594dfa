"""``fedtune.merge``: merge state dicts in memory, or folders into a folder."""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, overload

import yaml
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.library.cached_export import export_run_to_cache
from fedtune.offline_merge.merge_config import MergeConfig
from fedtune.offline_merge.read_config import parse_merge_config
from fedtune.offline_merge.run_merge import prepare_merge
from fedtune.offline_merge.state_dicts import merge_state_dicts
from fedtune.offline_merge.write_model import write_merged_model

__all__ = ["merge"]

StateDict = Mapping[str, Tensor]
Source = str | PathLike[str]
_BASE = "the base"


@overload
def merge(
    models: Sequence[StateDict],
    *,
    base: StateDict | None = None,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    **parameters: Any,
) -> dict[str, Tensor]: ...


@overload
def merge(
    models: Sequence[Source],
    *,
    output: Source,
    base: Source | None = None,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    **parameters: Any,
) -> Path: ...


def merge(
    models: Sequence[Any],
    *,
    base: Any = None,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    output: Source | None = None,
    **parameters: Any,
) -> Any:
    """Merge models by a method of ``fedtune merge``, with the same numbers.

    State dicts give a state dict. Folders, adapters and other sources give a folder: name it with ``output``.
    ``parameters`` are those of the method, and ``seed`` for methods that draw random numbers.

    >>> import fedtune, torch
    >>> before = {"w": torch.tensor([1.0, 1.0])}
    >>> one, other = {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 2.0])}
    >>> fedtune.merge([one, other], base=before, method="task-arithmetic", weights=[0.5, 0.5])
    {'w': tensor([2.0000, 1.5000])}
    """
    if not models:
        raise RecipeError("merge: there is no model; give at least one")
    in_memory = {isinstance(one, Mapping) for one in (*models, *([] if base is None else [base]))}
    if len(in_memory) > 1:
        raise RecipeError("merge: give state dicts or folders, not both; load the folders, or save the state dicts")
    if in_memory == {True}:
        if output is not None:
            raise RecipeError("merge: state dicts are merged in memory; drop output and save the result")
        named = {f"model {place}": state for place, state in enumerate(models, 1)}
        config, _ = _make_config(list(named), None if base is None else _BASE, method, weights, parameters)
        return merge_state_dicts(config, named if base is None else {_BASE: base, **named})
    if output is None:
        raise RecipeError("merge: name the folder of the result, e.g. output='merged'")
    sources = [fspath(one) for one in models]
    return _merge_folders(
        *_make_config(sources, None if base is None else fspath(base), method, weights, parameters), Path(output)
    )


def _make_config(
    names: Sequence[str],
    base: str | None,
    method: str,
    weights: Sequence[float] | None,
    parameters: Mapping[str, Any],
) -> tuple[MergeConfig, str]:
    if weights is not None and len(weights) != len(names):
        raise RecipeError(f"weights has {len(weights)} numbers for {len(names)} models; give one for each")
    own = [{}] * len(names) if weights is None else [{"parameters": {"weight": float(weight)}} for weight in weights]
    settings = {"seed": 0, **parameters}
    value = {
        "merge_method": method,
        "models": [{"model": name, **more} for name, more in zip(names, own, strict=True)],
        **({} if base is None else {"base_model": base}),
        "seed": settings.pop("seed"),
        "parameters": settings,
    }
    text = yaml.safe_dump(value, sort_keys=False)
    return parse_merge_config(text, "merge"), text


def _merge_folders(config: MergeConfig, text: str, output: Path) -> Path:
    from fedtune.offline_merge.model_card import CardContents, build_model_card, hash_model_files

    prepared = prepare_merge(config, lambda reference: export_run_to_cache(reference, None))
    if prepared.steps.needs:
        raise RecipeError(
            f"merge: {config.merge_method} measures activations; use fedtune merge with --calibration-data"
        )
    card = CardContents(output.name, prepared, text, hash_model_files(prepared), None, {}, prepared.warnings)
    write_merged_model(prepared, output, build_model_card(card))
    return output
