"""Requests of operators: submit, list, follow, stop and resume runs; list, tag and remove devices."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request

from fedtune.flower.control_client import ControlClient
from fedtune.plan.device_plans import describe_plans
from fedtune.recipe.refused_attacks import refuse_attacks
from fedtune.recipe.schema import Recipe
from fedtune.recipe.validation_errors import explain_validation_error
from fedtune.server.gateway.access_api import read_tags
from fedtune.server.gateway.authentication import Authenticator
from fedtune.server.gateway.refusal import AuditLog, RequestRefusedError
from fedtune.server.presence import Presence
from fedtune.server.recipe_check_process import RecipeCheckProcess
from fedtune.server.run_manager import RunManager
from fedtune.server.selection import check_base_for_devices
from fedtune.tracking import DeviceRecord, RunRecord, Store
from fedtune.tracking.run_json import make_run_document

__all__ = ["OperatorApi", "device_to_json"]


@dataclass(frozen=True)
class OperatorApi:
    """The gateway's API for operators. ``who`` is the name of the authenticated operator."""

    store: Store
    manager: RunManager
    presence: Presence
    guard: Authenticator
    audit: AuditLog
    control: Callable[[], ControlClient]
    check: RecipeCheckProcess

    def submit_run(self, who: str, _: Request, sent: Any) -> dict[str, Any]:
        """Queue a run of a recipe. A recipe contains only settings, never code.

        If it leaves techniques to a plan, the reply has a sentence about the plan of each device class.
        """
        try:
            recipe = Recipe.model_validate(sent.get("recipe") if isinstance(sent, dict) else None)
        except ValidationError as error:
            raise RequestRefusedError(400, explain_validation_error(error, Recipe, "the recipe"), who) from error
        refuse_attacks(recipe)
        check_base_for_devices(recipe)
        checked = self.check.check_recipe(recipe)
        run = self.manager.submit_run(checked)
        self.audit.record_action(who, f"run {run} submitted")
        return {"run": run, "plans": describe_plans(checked)}

    def list_runs(self, _: str, __: Request, ___: Any) -> dict[str, Any]:
        """Return all runs, newest first, without their rounds."""
        return {"runs": [make_run_document(self._as_planned(run), ()) for run in self.store.runs()]}

    def get_run(self, _: str, request: Request, __: Any) -> dict[str, Any]:
        """Return a run with its rounds after number ``after``, and the device of each client."""
        run = self.store.run(request.path_params["run"])
        after = _number(request.query_params.get("after", "-1"))
        rounds = self.store.rounds(run.id, after)
        assignments = [asdict(one) for one in self.store.access.list_assignments(run.id)]
        return make_run_document(self._as_planned(run), rounds, detailed=True) | {"assignments": assignments}

    def stop_run(self, who: str, request: Request, _: Any) -> dict[str, Any]:
        """Stop a queued or running run."""
        run = self.manager.stop_run(request.path_params["run"])
        self.audit.record_action(who, f"run {run} stopped")
        return {"run": run}

    def rollback(self, who: str, request: Request, sent: Any) -> dict[str, Any]:
        """Roll a run back to one of its rounds."""
        round_number = sent.get("round") if isinstance(sent, dict) else None
        if not isinstance(round_number, int) or isinstance(round_number, bool) or not 0 <= round_number < 2**31:
            raise RequestRefusedError(400, "a rollback needs a round number, 0 or larger", who)
        run, removed = self.manager.rollback(request.path_params["run"], round_number)
        self.audit.record_action(who, f"run {run} rolled back to round {round_number}; {removed} rounds removed")
        return {"run": run, "round": round_number, "removed": removed}

    def resume_run(self, who: str, request: Request, _: Any) -> dict[str, Any]:
        """Queue a stopped or failed run again."""
        run = self.manager.resume_run(request.path_params["run"])
        self.audit.record_action(who, f"run {run} resumed")
        return {"run": run}

    def list_devices(self, _: str, __: Request, ___: Any) -> dict[str, Any]:
        """Return the enrolled devices, and whether they are connected."""
        devices = self.store.access.list_devices()
        there = {found.name for found in self.presence.list_connected_devices(devices)}
        return {"devices": [device_to_json(found, online=found.name in there) for found in devices]}

    def change_device_tags(self, who: str, request: Request, sent: Any) -> dict[str, Any]:
        """Add tags to a device and remove others."""
        name, given = request.path_params["device"], sent if isinstance(sent, dict) else {}
        tags = self.store.access.change_device_tags(
            name, read_tags(given.get("add", [])), read_tags(given.get("remove", []))
        )
        self.audit.record_action(who, f"tags of device {name}: {', '.join(tags) or 'none'}")
        return {"device": name, "tags": tags}

    def release(self, who: str, request: Request, _: Any) -> dict[str, Any]:
        """Release a device from quarantine."""
        name = request.path_params["device"]
        released = self.store.access.release_device(name)
        if released:
            self.audit.record_action(who, f"device {name} released from quarantine")
        return {"device": name, "released": released}

    def remove_device(self, who: str, request: Request, _: Any) -> dict[str, Any]:
        """Remove a device. Its key is no longer valid."""
        found = self.store.access.find_device(request.path_params["device"])
        if found is None:
            raise RequestRefusedError(
                404, f"there is no device {request.path_params['device']!r}; list them first", who
            )
        self.control().unregister_node(int(found.node_id))
        self.store.access.remove_device(found.name)
        self.guard.clear_device_cache()
        self.audit.record_action(who, f"device {found.name} removed")
        return {"device": found.name}

    def _as_planned(self, run: RunRecord) -> RunRecord:
        """Return a run with the status running while it waits for its next attempt."""
        return self.manager.get_recorded_run(run)


def device_to_json(found: DeviceRecord, *, online: bool) -> dict[str, Any]:
    """Return a device as JSON, without its key."""
    return {
        "name": found.name,
        "online": online,
        "enrolled_at": found.enrolled_at.isoformat(),
        "last_seen_at": found.last_seen_at.isoformat() if found.last_seen_at else None,
        "profile": json.loads(found.profile),
        "tags": found.tags,
        "quarantine_reason": found.quarantine_reason,
    }


def _number(text: str) -> int:
    if not re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
        raise RequestRefusedError(
            400, f"after={text[:40]} is not a round number; leave it out, or write a whole number"
        )
    return int(text)
