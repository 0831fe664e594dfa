"""What a client does to its contribution before it leaves it, where the recipe asks for privacy."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fedtune.errors import ClientUpdateError
from fedtune.privacy import add_gaussian_noise, clip_to_norm, compute_noise_std, load_or_create_noise_key
from fedtune.recipe.schema import PrivacySettings
from fedtune.wire.client_update import ClientReport, TrainRequest, pack

__all__ = ["make_update_private", "redact_report"]


def make_update_private(
    deltas: Mapping[str, Tensor],
    extras: Mapping[str, Tensor],
    privacy: PrivacySettings,
    request: TrainRequest,
    folder: Path,
) -> dict[str, Tensor]:
    """The deltas, clipped and, with ``where: client``, noised by the secret in ``folder``, which is the client's own.

    The noise also depends on what it is added to: the same round begun again sends the same bits, and another
    contribution in its place never has the same noise. ClientUpdateError when more than deltas would be sent.
    """
    if extras:
        raise ClientUpdateError(f"it would send {min(extras)}, which is neither clipped nor noised; update the recipe")
    bounded = clip_to_norm(deltas, privacy.clipping_norm)
    if privacy.noise_added_by == "server":
        return bounded
    content = hashlib.sha256(pack(bounded)).hexdigest()
    return add_gaussian_noise(
        bounded,
        compute_noise_std(privacy),
        load_or_create_noise_key(folder),
        request.run_id,
        request.round,
        request.client,
        content,
    )


def redact_report(report: ClientReport) -> ClientReport:
    """What a client with noise of its own says beside it: what its work cost, but neither its examples nor its loss."""
    bare = replace(
        report,
        num_holdout_predictions=0,
        holdout_loss=0.0,
        holdout_accuracy=0.0,
        extra_holdout_metrics=(),
        trained_holdout_metrics=(),
    )
    return replace(bare, num_examples=1, loss=math.nan)
