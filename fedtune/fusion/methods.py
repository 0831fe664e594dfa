"""mergekit's methods as the merge steps of fedtune: what they act on, and where each parameter goes."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from pydantic import AliasChoices
from pydantic.fields import FieldInfo

from fedtune.errors import RecipeError
from fedtune.explain import nearest
from fedtune.fusion.settings import Layer, Value, lookup
from fedtune.merging import Combine
from fedtune.recipe import Unit
from fedtune.registry import build, names

__all__ = ["Method", "method"]

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
    "fisher": "either",
    "regmean": "either",
}
"""What a method combines: whole models, or deltas where a base is named; all others need deltas."""

_IGNORED = {"int8_mask"}
"""mergekit's parameter for how masks are held; none are held here."""

_SWITCHES = {
    "model-stock": frozenset({"filter_wise"}),
    "nuslerp": frozenset({"nuslerp_flatten", "nuslerp_row_wise"}),
}

_DEFAULTS: dict[str, Mapping[str, Value]] = {
    "ties": {"density": 1.0},
    "dare-linear": {"density": 1.0},
    "dare-ties": {"density": 1.0},
}
"""What mergekit takes where its schema says nothing; a recipe's steps have defaults of their own."""


class Method(NamedTuple):
    """A method by its name here, and what it acts on; ``copies``: passthrough, which takes one source as it is."""

    name: str
    acts: Acts
    copies: bool = False

    def check(self, layer: Layer, where: str) -> None:
        """RecipeError when some parameter means nothing to the method."""
        allowed = {"scale"} if self.copies else {"weight", *_spellings(self.name), *_switches(self.name)}
        for key in layer:
            if key not in allowed | _IGNORED:
                raise RecipeError(f"{where}: {self.name} has no parameter {key!r}; {nearest(key, sorted(allowed))}")

    def step(self, layers: Sequence[Layer], name: str, depth: float, seed: int = 0) -> Combine:
        """The combining step as it is set for one tensor; ``seed`` is for methods that draw."""
        if self.copies:
            return _built("linear", (("normalise", False),))
        keys = sorted({key for layer in layers for key in layer} - {"weight"} - _IGNORED)
        found = {key: lookup(key, layers, name, depth) for key in keys}
        drawn = {"seed": seed} if "seed" in _spellings(self.name) else {}
        return _built(self.name, _settings(self.name, {**drawn, **found}))

    def weight(self, layers: Sequence[Layer], name: str, depth: float) -> float:
        """A model's weight for one tensor; 1 where nothing is said."""
        found = lookup("scale" if self.copies else "weight", layers, name, depth)
        return 1.0 if found is None else float(found)

    def knobs(self, own: Layer, name: str, depth: float) -> dict[str, float]:
        """What a model sets for itself, under the names of the step's fields."""
        if self.copies:
            return {}
        found = {key: lookup(key, [own], name, depth) for key in own if key not in _IGNORED | {"weight"}}
        spelt = _spellings(self.name)
        return {spelt[key]: float(value) for key, value in found.items() if value is not None}


def method(name: str) -> Method:
    """The method of a configuration; RecipeError names what is near."""
    spelt = name.replace("_", "-")
    if spelt == "passthrough":
        return Method(spelt, "models", copies=True)
    if spelt not in names("fedtune.merging") or not _combines(spelt):
        combining = [one for one in names("fedtune.merging") if _combines(one)]
        raise RecipeError(f"merge_method: there is no {name!r}; {nearest(spelt, [*combining, 'passthrough'])}")
    return Method(spelt, _ACTS.get(spelt, "deltas"))


def _combines(name: str) -> bool:
    """Whether a unit merges tensors one by one; those of low-rank pairs are for rounds of a federation."""
    step: object = _built(name, ())
    return isinstance(step, Combine) and step.takes == "tensors"


def _settings(name: str, found: Mapping[str, Value | None]) -> tuple[tuple[str, Value], ...]:
    """The settings of a step, with mergekit's switches put into its words."""
    switches = _switches(name)
    said = {key: value for key, value in found.items() if value is not None and key not in switches}
    if found.get("filter_wise"):
        said["over"] = "row"
    if found.get("nuslerp_flatten") is False:
        said["over"] = "column" if found.get("nuslerp_row_wise") else "row"
    return tuple({**_DEFAULTS.get(name, {}), **said}.items())


def _switches(name: str) -> frozenset[str]:
    """mergekit's switches that stand for a value of ``over``."""
    return _SWITCHES.get(name, frozenset())


@lru_cache(maxsize=4096)
def _built(name: str, chosen: tuple[tuple[str, Any], ...]) -> Combine:
    step: Combine = build("fedtune.merging", Unit(name=name, settings=dict(chosen)), "parameters")
    return step


@lru_cache
def _spellings(name: str) -> dict[str, str]:
    """Everything a step's fields may be called, and the field it means."""
    fields = type(_built(name, ())).model_fields
    return {spelt: field for field, info in fields.items() for spelt in _spelt(field, info)}


def _spelt(field: str, info: FieldInfo) -> list[str]:
    alias = info.validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices]
    return [str(alias)] if alias is not None else [field]
