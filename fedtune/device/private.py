"""What a client does to its contribution before it leaves it, where the recipe asks for privacy."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fedtune.contribution import Order, Report, pack
from fedtune.errors import ContributionError
from fedtune.privacy import clipped, deviation, noised, secret
from fedtune.recipe import Privacy

__all__ = ["private", "withheld"]


def private(
    deltas: Mapping[str, Tensor], extras: Mapping[str, Tensor], privacy: Privacy, order: Order, folder: Path
) -> dict[str, Tensor]:
    """The deltas, clipped and, with ``where: client``, noised by the secret in ``folder``, which is the client's own.

    The noise also depends on what it is added to: the same round begun again sends the same bits, and another
    contribution in its place never has the same noise. ContributionError when more than deltas would be sent.
    """
    if extras:
        raise ContributionError(f"it would send {min(extras)}, which is neither clipped nor noised; update the recipe")
    bounded = clipped(deltas, privacy.clip)
    if privacy.where == "server":
        return bounded
    content = hashlib.sha256(pack(bounded)).hexdigest()
    return noised(bounded, deviation(privacy), secret(folder), order.run, order.round, order.client, content)


def withheld(report: Report) -> Report:
    """What a client with noise of its own says beside it: what its work cost, but neither its examples nor its loss."""
    bare = replace(report, own_predictions=0, own_loss=0.0, own_accuracy=0.0, own_more=(), own_after=())
    return replace(bare, examples=1, loss=math.nan)
