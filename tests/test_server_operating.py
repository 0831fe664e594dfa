"""What operators ask of quarantine and rollback, without sockets."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.requests import Request

from fedtune.server.gateway.operator_api import OperatorApi, device_to_json
from fedtune.server.gateway.refusal import RequestRefusedError
from fedtune.tracking import Store
from tests.federations import execute, outcome, trivial


class Audit:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def record_action(self, who: str, what: str) -> None:
        self.lines.append(f"{who}: {what}")


def operating(store: Store, audit: Audit, manager: Any = None) -> OperatorApi:
    others: Any = None
    return OperatorApi(store, manager, others, others, cast("Any", audit), others, others)


def asking(**path: str) -> Request:
    return cast("Request", SimpleNamespace(path_params=path))


def test_an_operator_releases_a_device_that_is_listed_as_quarantined(home: Path) -> None:
    audit = Audit()
    with Store.open() as store:
        store.access.add_device(name="kitchen", node_id="5", public_key="key")
        store.access.quarantine_device("kitchen", "3 rejected in a row: its report: examples is 0")
        [device] = store.access.list_devices()
        assert (
            device_to_json(device, online=True)["quarantine_reason"] == "3 rejected in a row: its report: examples is 0"
        )
        told = operating(store, audit).release("ada", asking(device="kitchen"), None)
        again = operating(store, audit).release("ada", asking(device="kitchen"), None)
        assert store.access.list_devices()[0].quarantine_reason is None
    assert (told, again) == ({"device": "kitchen", "released": True}, {"device": "kitchen", "released": False})
    assert audit.lines == ["ada: device kitchen released from quarantine"]


def test_an_operator_rolls_a_run_back(home: Path) -> None:
    execute(trivial())
    audit = Audit()
    with Store.open() as store:
        from fedtune.tracking.rollback import rollback_run

        manager = SimpleNamespace(rollback=lambda run, number: (run, rollback_run(store, run, number)))
        told = operating(store, audit, manager).rollback("ada", asking(run="run-1"), {"round": 1})
    assert told == {"run": "run-1", "round": 1, "removed": 1}
    assert [record.number for record in outcome("run-1").rounds] == [0, 1]
    assert audit.lines == ["ada: run run-1 rolled back to round 1; 1 rounds removed"]


@pytest.mark.parametrize("sent", [None, [], {}, {"round": -1}, {"round": "1"}, {"round": True}, {"round": 10**30}])
def test_a_rollback_without_a_round_s_number_is_refused(home: Path, sent: Any) -> None:
    with Store.open() as store, pytest.raises(RequestRefusedError):
        operating(store, Audit()).rollback("ada", asking(run="run-1"), sent)
