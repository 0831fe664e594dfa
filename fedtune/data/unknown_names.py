"""The check that labels are among those that a model knows."""

from collections.abc import Sequence

from fedtune.errors import DataError

__all__ = ["require_known_names"]


def require_known_names(rows: Sequence[Sequence[str]], known: Sequence[str], source: str, kind: str) -> None:
    """Raise DataError for the first name in ``rows`` that is not among the ``known`` ones.

    ``kind`` is what messages call a name. The error counts the rows that have an unknown name.
    """
    unknown = sorted({name for row in rows for name in row} - set(known))
    if unknown:
        raise DataError(
            f"{source}: the model does not know the {kind} {unknown[0]!r}; it knows {', '.join(known)}",
            code="unknown-labels",
            counts={"rows": sum(not set(row) <= set(known) for row in rows)},
        )
