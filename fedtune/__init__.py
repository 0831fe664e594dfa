"""Federated and continual fine-tuning for constrained devices.

``fedtune`` is a command line and a library. The names below are imported when they are first used, so that
``import fedtune`` itself loads neither torch nor anything else that is slow.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.errors import FedtuneError as FedtuneError
    from fedtune.errors import FedtuneWarning as FedtuneWarning
    from fedtune.library.measured_step import StepMemory as StepMemory
    from fedtune.library.measured_step import measure as measure
    from fedtune.library.model_merge import merge as merge
    from fedtune.library.prepared_model import PreparedModel as PreparedModel
    from fedtune.library.prepared_model import prepare as prepare
    from fedtune.library.recipe_input import load_recipe as load_recipe
    from fedtune.library.recorded_run import Run as Run
    from fedtune.library.recorded_runs import Runs as Runs
    from fedtune.library.recorded_runs import runs as runs
    from fedtune.library.simulated_run import StopRun as StopRun
    from fedtune.library.simulated_run import simulate as simulate
    from fedtune.recipe.schema import Recipe as Recipe
    from fedtune.server.events import ReplyReceived as ReplyReceived
    from fedtune.server.events import RoundEnded as RoundEnded
    from fedtune.server.events import RoundStarted as RoundStarted
    from fedtune.server.events import RunStarted as RunStarted

_MODULES = {
    "FedtuneError": "fedtune.errors",
    "FedtuneWarning": "fedtune.errors",
    "PreparedModel": "fedtune.library.prepared_model",
    "Recipe": "fedtune.recipe.schema",
    "ReplyReceived": "fedtune.server.events",
    "RoundEnded": "fedtune.server.events",
    "RoundStarted": "fedtune.server.events",
    "Run": "fedtune.library.recorded_run",
    "RunStarted": "fedtune.server.events",
    "Runs": "fedtune.library.recorded_runs",
    "StepMemory": "fedtune.library.measured_step",
    "StopRun": "fedtune.library.simulated_run",
    "load_recipe": "fedtune.library.recipe_input",
    "measure": "fedtune.library.measured_step",
    "merge": "fedtune.library.model_merge",
    "prepare": "fedtune.library.prepared_model",
    "runs": "fedtune.library.recorded_runs",
    "simulate": "fedtune.library.simulated_run",
}
"""Where each public name is defined."""

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its import warns of an optional package


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
