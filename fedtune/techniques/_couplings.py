"""The published couplings as rows of a table, and the plan that makes a model's blocks two-stream.

Nothing of fedtune is imported: the file travels with an exported model.
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

    first: Stages
    second: Stages
    scaled: tuple[bool, bool]
    damped: bool
    swap: bool
    main: Literal[0, 1]
    """The stream that carries the pretrained network's hidden states behind the last block."""


FULL_LAYER: Stages = ("attention", "feed")
STREAM_ADAPTER: Stages = ("stream",)
COUPLINGS = {
    "meft1": Coupling(FULL_LAYER, STREAM_ADAPTER, (True, False), damped=False, swap=True, main=1),
    "meft2": Coupling(STREAM_ADAPTER, FULL_LAYER, (False, True), damped=False, swap=True, main=0),
    "meft3": Coupling(("attention",), ("feed",), (True, True), damped=False, swap=False, main=1),
    "diff": Coupling(FULL_LAYER, STREAM_ADAPTER, (True, False), damped=True, swap=True, main=1),
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
