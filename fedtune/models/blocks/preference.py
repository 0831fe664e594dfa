"""What this process prefers: models of plain blocks, or those of transformers."""

import sys

__all__ = ["avoids_transformers", "prefer_plain_blocks", "prefers_plain_blocks"]

_preferred: list[bool] = []


def prefer_plain_blocks() -> None:
    """Build models of plain blocks in this process from now on, wherever their bits are those of transformers."""
    _preferred[:] = [True]


def prefers_plain_blocks() -> bool:
    """Whether this process builds models of plain blocks."""
    return bool(_preferred)


def avoids_transformers() -> bool:
    """Whether transformers should stay out of this process, which prefers plain blocks and has not imported it."""
    return prefers_plain_blocks() and "transformers" not in sys.modules
