"""The codecs of a recipe, and where a message belongs: the run's seed, the round and the client."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from fedtune.recipe.schema import Recipe
from fedtune.seeds import derive_seed
from fedtune.wire.codecs import Shape, WirePipeline, build_wire_pipeline

__all__ = ["MessagePlace", "build_down_pipeline", "build_up_pipeline", "is_running_statistic", "uses_feedback"]

_STATISTICS = (".running_mean", ".running_var")


class MessagePlace(NamedTuple):
    """Where a client update belongs.

    ``round_number`` is the round whose state the client started from. ``feedback_round`` is the round of the estimates
    that error feedback goes on from, 0 for none.
    """

    seed: int
    round_number: int
    client: int
    feedback_round: int = 0

    def derive_seed(self, name: str) -> int:
        """Return the seed of a tensor's random numbers."""
        return derive_seed(self.seed, self.round_number, self.client, "wire", name)

    def make_mark(self, pipeline: WirePipeline, shapes: Mapping[str, Shape]) -> bytes:
        """Return eight bytes that a message of another place, recipe or model does not have."""
        codecs = [(one.name, one.model_dump_json()) for one in pipeline.codecs]
        text = f"{tuple(self)} {codecs} {sorted((name, tuple(shape)) for name, shape in shapes.items())}"
        return hashlib.sha256(text.encode()).digest()[:8]


def build_up_pipeline(recipe: Recipe) -> WirePipeline | None:
    """Return the codecs of client updates; None without any. RecipeError as in ``build_wire_pipeline``."""
    return build_wire_pipeline(recipe.wire.up, "wire.up") if recipe.wire and recipe.wire.up else None


def build_down_pipeline(recipe: Recipe) -> WirePipeline | None:
    """Return the codecs of the shared state; None without any. RecipeError as in ``build_wire_pipeline``."""
    return build_wire_pipeline(recipe.wire.down, "wire.down") if recipe.wire and recipe.wire.down else None


def uses_feedback(recipe: Recipe) -> bool:
    """Whether devices and server remember what was sent before."""
    return recipe.wire is not None and recipe.wire.error_feedback != "none"


def is_running_statistic(name: str) -> bool:
    """Whether a tensor is a mean or a variance of a batch norm, which no codec changes."""
    return name.endswith(_STATISTICS)
