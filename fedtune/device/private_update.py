"""Clip a client update and add noise to it before it is sent, if the recipe has privacy."""

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
    """Return the deltas, clipped and, with ``noise_added_by: clients``, with noise from the secret in ``folder``.

    ``folder`` belongs to the client. The noise also depends on the deltas: a repeated round sends the same bits, and
    different deltas never get the same noise. Raise ClientUpdateError if ``extras`` would be sent too.
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
    """Return the report without the number of examples and without the loss. Costs stay."""
    bare = replace(
        report,
        num_holdout_predictions=0,
        holdout_loss=0.0,
        holdout_accuracy=0.0,
        extra_holdout_metrics=(),
        trained_holdout_metrics=(),
        task_predictions=None,
        task_accuracies=None,
        task_losses=None,
    )
    return replace(bare, num_examples=1, loss=math.nan)
