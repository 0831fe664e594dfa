"""Watches the drift signals of a run: figures of a round, the threshold, and the alarm.

All that lasts beyond a round is read from the metrics of committed rounds, so a resumed run decides as one left alone.
The rows have the split ``drift``. Of the domain ``all`` are: the mean over clients, under the signal's name; the
``threshold``; ``above``, how many clients lie above it; ``streak``, for how many rounds the mean has been above; and
``opens`` in a round whose alarm opens a new task, the round that still belongs to the old one. Of a device class there
is the mean over its clients.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from fedtune.continual._drift_opening import can_end_visit
from fedtune.continual._drift_threshold import DEFAULT_THRESHOLDS, compute_threshold
from fedtune.server.drift_reference import add_scores
from fedtune.server.events import DriftNoticed, emit_event
from fedtune.tracking import ClientScore, MetricRecord, RoundRecord
from fedtune.tracking.device_types import join_device_types
from fedtune.training import RunContext
from fedtune.wire.client_update import ClientUpdate

__all__ = ["SPLIT", "DriftWatch"]

SPLIT = "drift"
Metrics = tuple[MetricRecord, ...]


class DriftWatch:
    """The watch of one run. ``done`` are its committed rounds."""

    def __init__(self, context: RunContext, done: Sequence[RoundRecord]) -> None:
        self._context = context
        self._settings = None if context.recipe.stream is None else context.recipe.stream.drift
        self._threshold: float | None = None
        self._streak = 0
        self._newest: dict[int, float] = {}
        for record in done:
            self.record_commit(record.metrics, record.client_scores)

    def record_commit(self, metrics: Sequence[MetricRecord], scores: Sequence[ClientScore]) -> None:
        """Read the threshold, the streak and the newest signal of each client from a committed round."""
        found = {one.name: one.value for one in metrics if (one.split, one.domain) == (SPLIT, "all")}
        self._threshold = found.get("threshold", self._threshold)
        self._streak = 0 if "opens" in found else int(found.get("streak", self._streak))
        self._newest |= {one.client: one.value for one in scores if one.name == self._score_name}

    def list_rising_clients(self) -> list[int]:
        """Return the clients that ask to be trained, if they may: their newest signal lies above the threshold."""
        if self._settings is None or not self._settings.asks or self._threshold is None:
            return []
        return sorted(client for client, value in self._newest.items() if value > self._threshold)

    @property
    def _score_name(self) -> str:
        return "" if self._settings is None else f"{SPLIT}-{self._settings.signal}"

    def judge_round(self, round_number: int, updates: Sequence[ClientUpdate]) -> Metrics:
        """Return the metrics of a round, and tell which clients drift."""
        if self._settings is None:
            return ()
        threshold = self._update_threshold(round_number, updates)
        scores = {one.client: one.drift.value for one in updates if one.drift is not None}
        found = {} if threshold is None else {"threshold": threshold}
        if scores:
            mean = fmean(scores.values())
            found[self._settings.signal] = mean
            if threshold is not None:
                above = sorted(client for client, value in scores.items() if value > threshold)
                streak = self._streak + 1 if mean > threshold else 0
                found |= {"above": float(len(above)), "streak": float(streak)}
                alarm = streak >= self._settings.patience
                if alarm and self._settings.opens and can_end_visit(self._context.recipe, round_number + 1):
                    found["opens"] = float(round_number + 1)
                drifting = {client: scores[client] for client in above}
                emit_event(DriftNoticed(round_number, drifting, mean, threshold, streak if alarm else 0))
        device_type = join_device_types(one.device_type for one in updates if one.drift is not None)
        rows = [MetricRecord(split=SPLIT, domain="all", name=name, value=value) for name, value in found.items()]
        means = (replace(one, device_type=device_type) if one.name == self._settings.signal else one for one in rows)
        return (*means, *self._average_classes(updates))

    def list_client_scores(self, updates: Sequence[ClientUpdate]) -> tuple[ClientScore, ...]:
        """Return the signal of each client before it trained, and the examples it is of."""
        if self._settings is None:
            return ()
        return tuple(
            ClientScore(
                client=one.client,
                moment="before",
                name=self._score_name,
                value=value,
                num_predictions=count,
                device_type=one.device_type,
            )
            for one in updates
            if one.drift is not None
            for value, count in (one.drift,)
        )

    def _update_threshold(self, round_number: int, updates: Sequence[ClientUpdate]) -> float | None:
        """Read the threshold from the scores that clients sent in this round, if they did."""
        assert self._settings is not None
        counts = add_scores(self._context, round_number, updates)
        if counts is not None and int(counts.sum()):
            return compute_threshold(self._settings.signal, counts)
        if self._threshold is not None:
            return self._threshold
        return DEFAULT_THRESHOLDS.get(self._settings.signal)

    def _average_classes(self, updates: Sequence[ClientUpdate]) -> Metrics:
        """Return the mean of each device class, where there are several."""
        assert self._settings is not None
        recipe = self._context.recipe
        found: dict[str, list[tuple[float, str | None]]] = defaultdict(list)
        for one in updates:
            if one.drift is not None:
                found[recipe.get_device_class(one.client).name].append((one.drift.value, one.device_type))
        if len(recipe.devices) < 2:
            return ()
        return tuple(
            MetricRecord(
                split=SPLIT,
                domain=name,
                name=self._settings.signal,
                value=fmean(value for value, _ in figures),
                device_type=join_device_types(device_type for _, device_type in figures),
            )
            for name, figures in sorted(found.items())
            if name != "all"
        )
