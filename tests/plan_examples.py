"""Invented traces of a model, for tests of plans that trace nothing."""

from typing import Any

import pytest

from fedtune.plan import auto_techniques, plan_report
from fedtune.plan.prediction import Runtime
from fedtune.plan.settings_trace import BatchTrace, SettingsTrace

__all__ = ["MB", "RUNTIMES", "TRACES", "a_trace", "give_traces"]

MB = 10**6
RUNTIMES = {"torch": Runtime(100 * MB, 50 * MB)}


def a_trace(name: str, peak: int, flops: int, *, rank: int = 8, error: str | None = None) -> SettingsTrace:
    """Per example ``peak`` megabytes; with the margin of 17 MB and the runtime, a process takes 167 MB more."""
    batches = [
        BatchTrace(examples=n, kept_bytes=0, peak_bytes=n * peak * MB, step_bytes=n * peak * MB, flops=n * flops)
        for n in (1, 4)
    ]
    techniques: list[Any] = [{one: {}} for one in name.split("+")]
    shapes = {"layer.lora_A": [rank, 16]}
    return SettingsTrace(
        techniques=techniques, dtype="float32", runtime="torch", batches=batches, shapes=shapes, error=error
    )


TRACES = [a_trace("lora", 100, 10), a_trace("lora+gradient-checkpointing", 20, 14), a_trace("meft", 10, 15, rank=4)]


def give_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan with these traces instead of those of a model."""
    for module in (plan_report, auto_techniques):
        monkeypatch.setattr(module, "trace_settings", lambda *_: TRACES)
        monkeypatch.setattr(module, "measure_runtimes", lambda *_: RUNTIMES)
