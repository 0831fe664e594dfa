"""A table of the published couplings, and the plan that makes the blocks of a model two-stream.

Exported models include a copy of this file, so it imports nothing else of fedtune.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from ._halves import BlockParts

__all__ = ["COUPLINGS", "FULL_LAYER", "STAGES", "STREAM_ADAPTER", "Coupling", "CouplingPlan", "Stage", "Stages"]

Stage = Literal["attention", "feed", "stream"]
"""Half a block with its adapter, or the adapter that stands alone in the other stream."""
Stages = tuple[Stage, ...]
STAGES: tuple[Stage, ...] = get_args(Stage)


class Coupling(NamedTuple):
    """One variant: the stages F and G consist of, whether lambda and beta are the factor or 1, and what follows."""

    f_stages: Stages
    g_stages: Stages
    scales_streams: tuple[bool, bool]
    is_damped: bool
    swaps_streams: bool
    output_stream: Literal[0, 1]
    """The stream that carries the pretrained network's hidden states behind the last block."""


FULL_LAYER: Stages = ("attention", "feed")
STREAM_ADAPTER: Stages = ("stream",)
COUPLINGS = {
    "meft1": Coupling(FULL_LAYER, STREAM_ADAPTER, (True, False), is_damped=False, swaps_streams=True, output_stream=1),
    "meft2": Coupling(STREAM_ADAPTER, FULL_LAYER, (False, True), is_damped=False, swaps_streams=True, output_stream=0),
    "meft3": Coupling(("attention",), ("feed",), (True, True), is_damped=False, swaps_streams=False, output_stream=1),
    "diff": Coupling(FULL_LAYER, STREAM_ADAPTER, (True, False), is_damped=True, swaps_streams=True, output_stream=1),
}


@dataclass(frozen=True)
class CouplingPlan:
    """All it takes to make a plain model's blocks two-stream again, as JSON can hold it."""

    stack: str
    parts: tuple[BlockParts, ...]
    variant: str
    factor: float
    rank: int
    dropout: float
    merge: str
    pieces: int = 1
    """Runs of rows that attention, and of tokens that the feed-forward part takes one after the other."""
    grid: int | None = None
    """Bits behind the point of what F and G give; None for the published floating-point mode."""
    cuts: tuple[int, ...] = ()
    """Blocks behind which the streams are rounded to the grid again."""

    @property
    def coupling(self) -> Coupling:
        """The variant's row."""
        return COUPLINGS[self.variant]

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "CouplingPlan":
        """What ``dataclasses.asdict`` and JSON made of a plan."""
        parts = tuple(BlockParts(**{key: _tuple(value) for key, value in one.items()}) for one in found["parts"])
        return cls(**{**{key: _tuple(value) for key, value in found.items()}, "parts": parts})


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value
