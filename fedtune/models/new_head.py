"""The warning that a trained head is replaced by a new one."""

import warnings

from fedtune.errors import FedtuneWarning

__all__ = ["warn_of_new_head"]


def warn_of_new_head(source: str, found: int, wanted: int) -> None:
    """Warn that a head for ``found`` classes is replaced, because the data has ``wanted`` classes."""
    warnings.warn(
        f"model.source: {source} has a head for {found} classes, but the data have {wanted}; a new head is drawn from "
        "the seed, and what the old one learned is lost",
        FedtuneWarning,
        stacklevel=3,
    )
