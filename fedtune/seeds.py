"""Derives the seed of random numbers from where they are used.

No random state is kept between rounds, so a resumed run draws the same numbers.
"""

import hashlib

__all__ = ["derive_seed"]


def derive_seed(seed: int, *place: int | str) -> int:
    """Return a 63-bit seed for one place of a run, e.g. ``derive_seed(recipe.seed, round, client, "dropout")``."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
