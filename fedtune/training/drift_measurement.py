"""The drift signal of a client in a round, computed before it trains, and its part of the reference.

A quarter of a client's examples of a task stay out of the reference. Batches drawn from them are scored for the
threshold. They are smaller if a client has few examples: in domain, T2 does not depend on the size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.continual import find_last_layer
from fedtune.continual._drift_features import read_features
from fedtune.continual._drift_phases import DRIFT_PREFIX, SCORED_BATCHES
from fedtune.continual._drift_reference import compute_score, make_reference, read_last_layer
from fedtune.continual._drift_signals import LastLayer
from fedtune.continual._drift_threshold import count_scores
from fedtune.recipe.stream_settings import Drift
from fedtune.seeds import derive_seed
from fedtune.training.client_round import ClientRound
from fedtune.wire.client_update import FEWEST, DriftScore

__all__ = ["DriftMeasurement", "measure_drift"]

IntArray = NDArray[np.int64]
Tensors = Mapping[str, Tensor]
_FEWEST_OF_CLASS = 8
"""The sum over fewer examples of a class than this is not sent, because it could reveal single examples."""


@dataclass(frozen=True)
class DriftMeasurement:
    """A client's score, None if it has none, and the tensors that it adds to its update."""

    score: DriftScore | None = None
    upload: Tensors = field(default_factory=dict)


def measure_drift(client: ClientRound) -> DriftMeasurement:
    """Compute a client's drift signal on the received model, and what it uploads for it."""
    stream = client.stream
    if stream is None or stream.drift is None:
        return DriftMeasurement()
    reader = _Reader(client, stream.drift)
    reference = {
        name.removeprefix(DRIFT_PREFIX): one for name, one in stream.received.items() if name.startswith(DRIFT_PREFIX)
    }
    score = reader.score_batch(reference) if reference else None
    upload: Tensors = {}
    if stream.drift_phase == "reference":
        upload = reader.make_reference()
    elif stream.drift_phase == "threshold":
        scores = reader.score_spared_batches(reference) if reference else []
        upload = {"scores": count_scores(stream.drift.signal, scores)}
    return DriftMeasurement(score, {f"{DRIFT_PREFIX}{name}": tensor for name, tensor in upload.items()})


class _Reader:
    """Reads the features of a client's examples."""

    def __init__(self, client: ClientRound, settings: Drift) -> None:
        assert client.stream is not None
        self._client, self._settings, self._num_labels = client, settings, client.stream.num_labels
        self._rows, _ = client.split_rows()
        seed = derive_seed(client.recipe.seed, client.client, "drift")
        order = np.random.default_rng(seed).permutation(self._rows)
        spared = len(order) // 4
        self._spared, self._referenced = order[:spared], order[spared:]
        self._layer = self._read_layer()

    def score_batch(self, reference: Tensors) -> DriftScore | None:
        """Score a batch that is drawn anew in each round; None for fewer than ``FEWEST`` examples of known classes."""
        random = np.random.default_rng(self._client.derive_seed("drift"))
        rows = random.permutation(self._rows)[: self._settings.batch]
        found = compute_score(self._settings.signal, *self._read(rows), reference, self._layer)
        return None if found is None or found.num_examples < FEWEST else DriftScore(found.value, found.num_examples)

    def score_spared_batches(self, reference: Tensors) -> list[float]:
        """Score batches of the examples that are not in the reference; none if there are too few."""
        if len(self._spared) < FEWEST:
            return []
        features, labels = self._read(self._spared)
        random = np.random.default_rng(self._client.derive_seed("drift-threshold"))
        size, found = min(self._settings.batch, max(FEWEST, len(features) // 2)), []
        for _ in range(SCORED_BATCHES):
            drawn = random.permutation(len(features))[:size]
            own = None if labels is None else labels[drawn]
            found.append(compute_score(self._settings.signal, features[drawn], own, reference, self._layer))
        return [one.value for one in found if one is not None]

    def make_reference(self) -> Tensors:
        """Return this client's part of the reference. Classes with few examples are left out."""
        features, labels = self._read(self._referenced)
        groups = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
        kept = torch.bincount(groups, minlength=max(1, self._num_labels))[groups] >= _FEWEST_OF_CLASS
        own = None if labels is None else labels[kept]
        return make_reference(self._settings.signal, features[kept], own, self._num_labels, self._layer)

    def _read(self, rows: IntArray) -> tuple[Tensor, Tensor | None]:
        client, size = self._client, self._client.micro_batch_size or self._client.recipe.train.batch_size
        chosen: list[Sequence[int]] = [rows[start : start + size].tolist() for start in range(0, len(rows), size)]
        batches = [client.examples.make_batch(one) for one in chosen]
        features = read_features(client.model, client.techniques, self._num_labels, batches)
        if self._settings.signal == "plain":
            return features, None
        return features, torch.cat([batch["labels"] for batch in batches])

    def _read_layer(self) -> LastLayer:
        """Only nac and scale use it; the others accept one without classes."""
        stream = self._client.stream
        assert stream is not None
        if self._settings.signal in ("centred", "plain"):
            return LastLayer(torch.zeros(0), torch.zeros(0))
        classes = None if stream.seen_classes is None else list(stream.seen_classes)
        return read_last_layer(find_last_layer(self._client.model, self._num_labels), classes)
