"""Attacks in rounds of real training: by a recipe on a device's data, and by a device on the others of its run."""

import json
from contextlib import suppress
from typing import Any

import httpx
import torch

from fedtune.errors import FedtuneError
from fedtune.flower.fleet_client import FleetClient
from fedtune.logs import Logs
from fedtune.server.quarantine import REFUSALS
from fedtune.wire.client_update import ClientReport, decode_tensors, pack
from tests.attacks.in_a_round import PATIENCE, claimed, make_fleet, stopped
from tests.attacks.scene import Attack, Scene
from tests.federations import trivial, words
from tests.servers import Knocker, ended, joined

__all__ = ["ATTACKS"]

_SECRET = "patient 4711 has a rash"
_FAIR = ("fair-1", "fair-2")
_HUGE = 3e38


def _submit(scene: Scene, recipe: Any) -> str:
    with scene.server.operator() as connection:
        run: str = connection.request_json("POST", "runs", {"recipe": recipe.model_dump(mode="json")})["run"]
    scene.left_open.append(lambda: stopped(scene, run))
    return run


def _records(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [sent for record in found["rounds"] for sent in record["client_records"]]


def _labels_are_texts(scene: Scene) -> str:
    """An operator's recipe takes a device's texts for its labels; the device's own rows are none of the classes."""
    folder = scene.folder / "private"
    folder.mkdir()
    one = ("devices=[{name: any, count: 1, memory: 4GB}]", "federation.selection={devices: [device-0]}")
    recipe = words(folder, *one, "data.columns={text: text, label: text}", "federation.rounds=1")
    rows = [f"film {number} was {word},{word}" for number in range(20) for word in ("fine", "dull")] * 3
    (folder / "words.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (folder / "own-name.csv").write_text(f"text,label\n{_SECRET},fine\nthe film was fine,fine\n")
    with joined(scene.server, folder, f"csv:{folder}/own-name.csv") as [device]:
        found = ended(scene.server, _submit(scene, recipe), PATIENCE)
        assert _SECRET in device.log, "its own log tells what is wrong"
    logs = Logs(scene.server.place.folder)
    with scene.server.operator() as connection:
        told = connection.request_json("GET", f"runs/{found['id']}/logs?lines=5000")
    audit = [line.message for line in scene.server.audit()]
    everything = json.dumps([found["rounds"], found["reason"], told, logs.server(5000), audit])
    for hidden in (_SECRET, "4711", "own-name"):
        assert hidden not in everything, f"{hidden} has left the device"
    [sent] = _records(found)
    assert sent["status"] == "error", sent
    return str(sent["reason"])


def _early(scene: Scene) -> str:
    """It confirms and answers each order without having fetched it, while the server may still be sending it."""
    fleet = make_fleet(scene, scene.hostile, scene.node)
    fleet.send_heartbeat()
    recipe = trivial("devices=[{name: any, count: 1, memory: 64MB}]", "federation.selection={devices: [hostile]}")
    run = _submit(scene, recipe)
    for _ in range(recipe.federation.rounds):
        _answer(fleet, claimed(fleet), b"guessed")
    found = ended(scene.server, run, PATIENCE)
    fleet.close()
    assert {sent["status"] for sent in _records(found)} == {"rejected"}, _records(found)
    assert "no round got enough usable client updates" in found["reason"], found["reason"]
    assert len({record["checkpoint"]["sha256"] for record in found["rounds"] if record["checkpoint"]}) == 1
    return "; ".join(sent["reason"] for sent in _records(found))


def _answer(fleet: FleetClient, claim: bytes, payload: bytes) -> None:
    report = ClientReport(3, loss=1.0, seconds=1.0, activation_memory=1, peak_memory=1)
    with suppress(httpx.HTTPError, FedtuneError):  # a reply may be refused at once
        fleet.push_update(claim, payload, report.to_fields(), 1.0)


def _trained(fleet: FleetClient, value: float) -> None:
    """Answer the next order with deltas that are all of one value."""
    claim = claimed(fleet)
    state = decode_tensors(fleet.download_message(claim).payload)
    _answer(fleet, claim, pack({name: torch.full_like(tensor, value) for name, tensor in state.items()}))


def _again_and_again(scene: Scene) -> str:
    """3e38 beside two honest devices, round after round; then an operator lets the device in again."""
    fleets = [make_fleet(scene, scene.hostile, scene.node)]
    for name in _FAIR:
        knocker = Knocker(scene.server)
        fleets.append(make_fleet(scene, knocker, int(knocker.enroll(scene.server.token(name)).json()["node_id"])))
    for fleet in fleets:
        fleet.send_heartbeat()
    whom = f"federation.selection={{devices: [hostile, {', '.join(_FAIR)}]}}"
    recipe = trivial("devices=[{name: any, count: 3, memory: 64MB}]", whom, f"federation.rounds={REFUSALS + 1}")
    run = _submit(scene, recipe)
    for number in range(REFUSALS + 1):
        for fleet, value in zip(fleets, (_HUGE, 0.001, 0.002), strict=True):
            if number < REFUSALS or value != _HUGE:
                _trained(fleet, value)
    found = ended(scene.server, run, PATIENCE)
    for fleet in fleets:
        fleet.close()
    _check_others(found)
    return _released(scene)


def _check_others(found: dict[str, Any]) -> None:
    """Each round was merged without the hostile update, and the last did not ask for one."""
    assert found["status"] == "completed", found["reason"]
    statuses = [
        {sent["device_name"]: sent["status"] for sent in record["client_records"]} for record in found["rounds"][1:]
    ]
    fair = dict.fromkeys(_FAIR, "merged")
    assert statuses == [*([{"hostile": "rejected"} | fair] * REFUSALS), fair], statuses
    assert all(record["status"] == "completed" for record in found["rounds"])
    losses = [metric["value"] for metric in found["metrics"] if metric["name"] == "loss"]
    assert all(loss is not None and loss < 100 for loss in losses), losses


def _released(scene: Scene) -> str:
    """The device is listed as quarantined with the reason, and no more after its release."""
    with scene.server.operator() as connection:
        reason = _quarantine_reason(connection.request_json("GET", "devices"))
        assert reason, "it is not quarantined"
        assert reason.startswith(f"{REFUSALS} rejected in a row")
        assert connection.request_json("POST", "devices/hostile/release")["released"]
        assert _quarantine_reason(connection.request_json("GET", "devices")) is None
    assert any("hostile released from quarantine" in line.message for line in scene.server.audit())
    return reason


def _quarantine_reason(told: dict[str, Any]) -> str | None:
    [reason] = [one["quarantine_reason"] for one in told["devices"] if one["name"] == "hostile"]
    return None if reason is None else str(reason)


ATTACKS = [
    Attack("a recipe that takes a device's texts for labels", _labels_are_texts, ""),
    Attack("an order confirmed before it is fetched", _early, ""),
    Attack("3e38 beside honest devices, until it is quarantined", _again_and_again, ""),
]
