"""Lets transformers load an exported MEFT model: ``from_pretrained(folder, trust_remote_code=True)``.

No configuration of transformers can describe these blocks, so the exported folder contains this file and those that it
imports. The model has its own model type, so that transformers refuses to load it without that flag.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import asdict
from functools import cache
from typing import Any

import transformers

from ._couplings import CouplingPlan
from ._two_streams import couple_blocks, run_with_autograd

__all__ = ["export_with_code"]

_PREFIX = "Meft"
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
}


def export_with_code(model: Any, plan: CouplingPlan) -> None:
    """Let a transformers model with coupled blocks save itself with this code."""
    [auto_class] = [auto for ending, auto in _AUTO.items() if type(model).__name__.endswith(ending)]
    model.config.__class__ = _class(_PREFIX + type(model.config).__name__)
    model.config.meft = asdict(plan)
    model.__class__ = _class(_PREFIX + type(model).__name__)
    model._weight_conversions = []  # the weights go under the names they have here: a new type has no older ones
    type(model.config).register_for_auto_class()
    type(model).register_for_auto_class(auto_class)


@cache
def _class(name: str) -> type[Any]:
    base = getattr(transformers, name.removeprefix(_PREFIX))
    if issubclass(base, transformers.PretrainedConfig):
        return type(name, (base,), {"__module__": __name__, "model_type": f"meft-{base.model_type}", "meft": {}})
    settings = {
        "__module__": __name__,
        "config_class": _class(_PREFIX + base.config_class.__name__),
        "__init__": _initialiser(base),
    }
    return type(name, (base,), settings)


def _initialiser(base: type[Any]) -> Callable[..., None]:
    """Builds the plain model with the plain configuration class, then couples its blocks."""

    def initialise(self: Any, config: Any, *others: Any, **settings: Any) -> None:
        held = copy(config)
        held.__class__ = getattr(transformers, type(config).__name__.removeprefix(_PREFIX))
        base.__init__(self, held, *others, **settings)
        self.config.__class__ = type(config)
        found: Mapping[str, Any] = config.meft
        couple_blocks(self, CouplingPlan.from_json(found), run_with_autograd)

    return initialise


def __getattr__(name: str) -> Any:
    """The class MeftX, made from X of transformers."""
    if name.startswith(_PREFIX):
        return _class(name)
    raise AttributeError(name)
