"""The sentence that tells of a trained head given up for a new one."""

import warnings

from fedtune.errors import FedtuneWarning

__all__ = ["warn_of_new_head"]


def warn_of_new_head(source: str, found: int, wanted: int) -> None:
    """Say that a model's head is for ``found`` classes and cannot be kept, since the data have ``wanted``."""
    warnings.warn(
        f"model.source: {source} has a head for {found} classes, but the data have {wanted}; a new head is drawn from "
        "the seed, and what the old one learned is lost",
        FedtuneWarning,
        stacklevel=3,
    )
