"""Invented rows for the tests of the store; every value differs from its neighbours so that a mix-up shows."""

import json
from dataclasses import replace
from typing import Any

from fedtune.tracking import CheckpointRecord, ClientRecord, MetricRecord, RoundRecord, Store

__all__ = ["DOMAINS", "a_client_record", "a_metric", "a_round", "fill", "start"]

DOMAINS = ("film", "tweets", "all")


def a_client_record(client: int, **changes: Any) -> ClientRecord:
    one = ClientRecord(
        client=client,
        device_class="phone" if client < 2 else "tablet",
        status="merged",
        reason="",
        num_examples=100 + client,
        bytes_down=3_000_000_000 + client,
        bytes_up=2_000_000_000 + client,
        seconds=1.5 + client,
        activation_memory=5_000_000_000 + client,
        peak_memory=7_000_000_000 + client,
        update_norm=0.25 + client,
        train_loss=0.5 + client,
        anonymous_memory=6_000_000_000 + client,
        file_memory=800_000_000 + client,
    )
    return replace(one, **changes)


def a_metric(value: float, split: str = "validation", domain: str = "all", name: str = "accuracy") -> MetricRecord:
    return MetricRecord(split=split, domain=domain, name=name, value=value)


def a_round(number: int, **changes: Any) -> RoundRecord:
    """Accuracy rises by a tenth each round; film lies 0.1 above tweets; round 0 has no contributions."""
    metrics = [
        a_metric(round(0.5 + number / 10 + shift, 9), domain=d)
        for d, shift in zip(DOMAINS, (0.1, 0, 0.05), strict=True)
    ]
    one = RoundRecord(
        number=number,
        status="completed",
        reason="",
        seconds=2.5 + number,
        client_records=tuple(a_client_record(client) for client in range(3)) if number else (),
        metrics=tuple(sorted(metrics, key=lambda metric: metric.domain)),
        checkpoint=CheckpointRecord(path=f"a/round-{number}", sha256=f"{number:064x}", bytes=10**10 + number),
    )
    return replace(one, **changes)


def start(store: Store, run_id: str = "film-1a2b", **changes: Any) -> None:
    recipe = {"name": "film", "train": {"techniques": [{"lora": {"rank": 8}}], "lr": 0.001}}
    values: dict[str, Any] = {"id": run_id, "name": "film", "seed": 3, "engine": "in-process", "rounds_planned": 3}
    store.create_run(**(values | {"recipe": json.dumps(recipe)} | changes))


def fill(store: Store, run_id: str = "film-1a2b", rounds: int = 3, **changes: Any) -> list[RoundRecord]:
    """A run that completed, and its rounds."""
    start(store, run_id, **changes)
    recorded = [a_round(number) for number in range(rounds + 1)]
    for record in recorded:
        store.commit_round(run_id, record)
    store.finish(run_id, "completed")
    return recorded
