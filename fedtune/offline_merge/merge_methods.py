"""mergekit's methods as merge steps of fedtune, and the field of the step for each of mergekit's parameters."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from pydantic import AliasChoices
from pydantic.fields import FieldInfo

from fedtune.errors import RecipeError
from fedtune.merging import CombineStep
from fedtune.offline_merge.layered_parameters import ParameterLayer, Value, find_value
from fedtune.recipe.schema import Unit
from fedtune.recipe.unit_registry import build_unit, list_unit_names
from fedtune.recipe.validation_errors import suggest_nearest
from fedtune.recipe.version_names import UNIT_KEYS

__all__ = ["BoundModel", "MergeMethod", "build_merge_method"]

Acts = Literal["models", "deltas", "either"]

_ACTS: dict[str, Acts] = {
    "linear": "models",
    "slerp": "models",
    "karcher": "models",
    "nuslerp": "either",
    "multislerp": "either",
    "mean": "either",
    "geometric-median": "either",
    "trimmed-mean": "either",
    "median": "either",
    "krum": "either",
    "multi-krum": "either",
    "bulyan": "either",
    "fisher": "either",
    "regmean": "either",
    "lorm": "either",
}
"""Methods that combine whole models, or deltas if a base is named. All others need deltas."""

_IGNORED = frozenset({"int8_mask"})
"""mergekit's parameter for the data type of masks. It has no effect here, because masks are not stored."""

_OWN = ("density", "gamma", "epsilon", "rescale")
"""Fields of a step that may differ between models. All others apply to the whole merge."""

_IDLE = {"task-arithmetic": frozenset({"rescale"}), "multislerp": frozenset({"eps"})}
"""mergekit's parameters without an effect here."""

_FIXED: dict[str, Mapping[str, Value]] = {
    "multislerp": {"normalize_weights": True},
    "task-arithmetic": {"density": 1.0},
}
"""mergekit's parameters that must have mergekit's default here."""

_SWITCHES = {
    "model-stock": frozenset({"filter_wise"}),
    "nuslerp": frozenset({"nuslerp_flatten", "nuslerp_row_wise"}),
}

_DEFAULTS: dict[str, Mapping[str, Value]] = {
    "ties": {"density": 1.0},
    "dare-linear": {"density": 1.0},
    "dare-ties": {"density": 1.0},
    "della": {"density": 1.0},
    "della-linear": {"density": 1.0},
    "breadcrumbs": {"density": 1.0},
    "breadcrumbs-ties": {"density": 1.0},
}
"""mergekit's defaults. The steps of a recipe have their own defaults."""


class BoundModel(NamedTuple):
    """One model's settings for a tensor: its weight, its fields of the step, and whether nothing is kept."""

    weight: float
    overrides: Mapping[str, float]
    nothing: bool = False


class MergeMethod(NamedTuple):
    """A method by its name in fedtune, and what it operates on. ``is_passthrough``: it copies one source."""

    name: str
    operates_on: Acts
    is_passthrough: bool = False

    def check_parameters(self, layer: ParameterLayer, where: str, *, own: bool = False) -> None:
        """Raise RecipeError for a parameter that the method lacks, or with ``own``, that one model cannot have."""
        spelt = {} if self.is_passthrough else _spellings(self.name)
        allowed = {"scale"} if self.is_passthrough else {"weight", *spelt, *_switches(self.name)}
        fixed = _FIXED.get(self.name, {})
        for key in (key for key in layer if key not in _ignored(self.name)):
            if key in fixed and key not in allowed:
                if layer[key] != fixed[key]:
                    value = str(fixed[key]).lower()
                    raise RecipeError(f"{where}: {self.name} knows {key} only as {value}; leave it out")
            elif key not in allowed:
                raise RecipeError(
                    f"{where}: {self.name} has no parameter {key!r}; {suggest_nearest(key, sorted(allowed))}"
                )
            elif own and not self.is_passthrough and key != "weight" and spelt.get(key) not in _OWN:
                raise RecipeError(
                    f"{where}: {key} of {self.name} is a setting of the whole merge, not of one model; move it to the "
                    "merge's parameters"
                )

    def build_step(self, layers: Sequence[ParameterLayer], name: str, depth: float, seed: int = 0) -> CombineStep:
        """Build the combining step for one tensor. ``seed`` is for methods that draw random numbers."""
        if self.is_passthrough:
            return _built("linear", (("normalise", False),))
        spelt, fixed = _spellings(self.name), _FIXED.get(self.name, {})
        told = {key for layer in layers for key in layer} - {"weight", *_ignored(self.name), *fixed}
        found = {key: find_value(key, layers, name, depth) for key in sorted(told) if spelt.get(key) not in _OWN}
        drawn = {"seed": seed} if "seed" in spelt else {}
        return _built(self.name, _settings(self.name, {**drawn, **found}))

    def bind_model(self, layers: Sequence[ParameterLayer], name: str, depth: float) -> BoundModel:
        """Return one model's settings for a tensor. ``layers`` begin with its own parameters; ``name`` is the tensor's.

        The defaults are mergekit's. A density of zero keeps nothing, in every method.
        """
        key = "scale" if self.is_passthrough else "weight"
        found = find_value(key, layers, name, depth)
        if found is None and not self.is_passthrough and any(layer.get(key) for layer in layers):
            raise RecipeError(
                f"parameters: weight says nothing of {name}; end its list with {{value: ...}} for the rest"
            )
        weight = 1.0 if found is None else _real(found, "weight")
        if self.is_passthrough:
            return BoundModel(weight, {})
        fields = [field for field in _OWN if field in _spellings(self.name)]
        values = {field: value for field in fields if (value := find_value(field, layers, name, depth)) is not None}
        if values.get("density") == 0:
            return BoundModel(weight, {}, nothing=True)
        checked = _built(self.name, tuple({**_DEFAULTS.get(self.name, {}), **values}.items()))
        return BoundModel(weight, {field: getattr(checked, field) for field in values})


def _ignored(name: str) -> frozenset[str]:
    return _IDLE.get(name, frozenset()) | _IGNORED


def _real(value: Value, what: str) -> float:
    if isinstance(value, str):
        raise RecipeError(f"parameters: {what} is {value!r}, but must be a number")
    return float(value)


def build_merge_method(name: str) -> MergeMethod:
    """Return the method of a configuration; RecipeError suggests similar names."""
    spelt = name.replace("_", "-")
    if spelt == "passthrough":
        return MergeMethod(spelt, "models", is_passthrough=True)
    if spelt not in list_unit_names("fedtune.merging") or not _combines(spelt):
        combining = [one for one in list_unit_names("fedtune.merging") if _is_suggested(one)]
        raise RecipeError(f"merge_method: there is no {name!r}; {suggest_nearest(spelt, [*combining, 'passthrough'])}")
    return MergeMethod(spelt, _ACTS.get(spelt, "deltas"))


def _combines(name: str) -> bool:
    """Whether a unit merges tensors one by one. Units for low-rank pairs work in rounds of a federation only."""
    step: object = _built(name, ())
    return isinstance(step, CombineStep) and step.update_kind == "tensors"


def _is_suggested(name: str) -> bool:
    """Whether a unit combines; one of another package that cannot be imported does not."""
    try:
        return _combines(name)
    except RecipeError:
        return False


def _settings(name: str, found: Mapping[str, Value | None]) -> tuple[tuple[str, Value], ...]:
    """Return the settings of a step. mergekit's switches become fields."""
    switches = _switches(name)
    said = {key: value for key, value in found.items() if value is not None and key not in switches}
    if found.get("filter_wise"):
        said["granularity"] = "row"
    if found.get("nuslerp_flatten") is False:
        said["granularity"] = "column" if found.get("nuslerp_row_wise") else "row"
    return tuple({**_DEFAULTS.get(name, {}), **said}.items())


def _switches(name: str) -> frozenset[str]:
    """Return mergekit's switches that stand for a value of ``granularity``."""
    return _SWITCHES.get(name, frozenset())


@lru_cache(maxsize=4096)
def _built(name: str, chosen: tuple[tuple[str, Any], ...]) -> CombineStep:
    step: CombineStep = build_unit("fedtune.merging", Unit(name=name, settings=dict(chosen)), "parameters")
    return step


@lru_cache
def _spellings(name: str) -> dict[str, str]:
    """Return the field for each name that mergekit or fedtune uses."""
    fields = type(_built(name, ())).model_fields
    spelt = {spelling: field for field, info in fields.items() for spelling in _spelt(field, info)}
    return {**spelt, **UNIT_KEYS.get(name, {})}


def _spelt(field: str, info: FieldInfo) -> list[str]:
    alias = info.validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [str(alias)] if alias is not None else [field]
