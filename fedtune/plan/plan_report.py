"""Traces a recipe's settings in a process of its own and chooses among them. Nothing here imports torch."""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from fedtune.child_processes import environment, make_isolated_command
from fedtune.errors import FedtuneError
from fedtune.plan.cache import read_entry, write_entry
from fedtune.plan.plans import Plan, choose_plan, correct_plan, describe_plan, keep_pareto_set, list_plans
from fedtune.plan.runtimes import measure_runtimes
from fedtune.plan.settings_trace import SettingsTrace
from fedtune.plan.trainer_kind import explain_trainer
from fedtune.recipe.schema import Recipe, Unit

__all__ = ["PlanReport", "PlanRequest", "explain_choice", "make_plan_report", "trace_settings"]


class PlanRequest(NamedTuple):
    """What is planned. ``modules`` are what a trainer imports; ``techniques`` replaces the default lists.

    ``correction`` is the factor on predicted memory that earlier contributions taught.
    """

    recipe: Recipe
    budget: int
    time_weight: float = 1.0
    techniques: list[list[Unit]] | None = None
    modules: tuple[str, ...] = ("fedtune.training",)
    correction: float = 1.0


class PlanReport(NamedTuple):
    """The Pareto set, the recommended plan if one fits, and the plans for other budgets.

    ``smallest`` needs the least memory of all. ``failed`` are settings that cannot be used, with the reason. The memory
    of all plans includes the ``correction``. ``trainer`` says what the process imports that the memory is of.
    """

    budget: int
    plans: list[Plan]
    recommended: Plan | None
    reason: str
    with_more: Plan | None
    with_less: Plan | None
    smallest: Plan
    failed: dict[str, str]
    correction: float = 1.0
    trainer: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        named = {"recommended": self.recommended, "with_25_percent_more": self.with_more}
        named |= {"with_25_percent_less": self.with_less, "smallest": self.smallest}
        return {
            "budget": self.budget,
            "plans": [plan.to_dict() for plan in self.plans],
            **{name: None if plan is None else plan.to_dict() for name, plan in named.items()},
            "reason": self.reason,
            "failed": self.failed,
            "correction": self.correction,
            "trainer": self.trainer,
        }


def make_plan_report(request: PlanRequest) -> PlanReport:
    """Return the report; FedtuneError if no settings can be used at all."""
    traces = trace_settings(request.recipe, request.techniques)
    failed = {trace.name: trace.error for trace in traces if trace.error is not None}
    working = [trace for trace in traces if trace.error is None]
    if not working:
        raise FedtuneError(f"no settings can be planned: {next(iter(failed.values()))}")
    runtimes = measure_runtimes(sorted({trace.runtime for trace in working}), request.modules)
    traced = list_plans(working, runtimes, request.recipe.train)
    plans = [correct_plan(plan, request.correction) for plan in traced]
    best = keep_pareto_set(plans)
    chosen, more, less = (
        choose_plan(plans, int(request.budget * share), request.time_weight) for share in (1, 1.25, 0.75)
    )
    smallest = min(plans, key=lambda plan: plan.needed_bytes)
    reason = explain_choice(chosen, smallest, request)
    told = explain_trainer(working)
    return PlanReport(request.budget, best, chosen, reason, more, less, smallest, failed, request.correction, told)


def trace_settings(
    recipe: Recipe, techniques: Sequence[Sequence[Unit]] | None, *, plain_blocks: bool = True
) -> list[SettingsTrace]:
    """Return a trace of each candidate, from the cache if the same was traced before.

    The process is a device's trainer, or with ``plain_blocks`` false one that builds models with transformers.
    """
    lists = [[unit.model_dump(mode="json") for unit in units] for units in techniques or ()]
    settings = json.loads(recipe.model_dump_json())
    body = {"recipe": settings, "techniques": lists or None, "plain_blocks": plain_blocks}
    key = _make_key(recipe, body)
    if stored := _read_traces(key):
        return stored
    reply = _run_worker(json.dumps(body))
    write_entry(key, reply["traces"])
    return [SettingsTrace.model_validate(one) for one in reply["traces"]]


def _read_traces(key: list[str]) -> list[SettingsTrace]:
    """Return the stored traces; none if there are none, or if another version wrote them in another form."""
    try:
        return [SettingsTrace.model_validate(one) for one in read_entry(key) or ()]
    except (ValidationError, TypeError):
        return []


def _make_key(recipe: Recipe, body: dict[str, Any]) -> list[str]:
    """What a trace depends on: the settings of the step, the configuration of the model, and the libraries."""
    settings = body["recipe"]
    step = {name: settings.get(name) for name in ("task", "model", "train", "data", "seed", "stream", "merge")}
    step["algorithm"] = settings["federation"].get("algorithm")  # it may hold copies of what is trained
    kind, _, name = recipe.model.source.partition(":")
    config = Path(name).expanduser() / "config.json"
    text = config.read_text(encoding="utf-8") if kind == "path" and config.is_file() else ""
    libraries = [f"{one} {version(one)}" for one in ("fedtune", "torch", "transformers", "peft")]
    return ["traces", _hash_own_code(), json.dumps([step, body["techniques"], body["plain_blocks"]]), text, *libraries]


def _hash_own_code() -> str:
    """Return a digest of the dates and sizes of fedtune's files, so that a changed technique is traced again."""
    folder = Path(__file__).resolve().parents[1]
    found = sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in folder.rglob("*.py"))
    return hashlib.sha256(repr(found).encode()).hexdigest()


def _run_worker(request: str) -> dict[str, Any]:
    command = make_isolated_command("fedtune.plan.worker")
    done = subprocess.run(command, input=request, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise FedtuneError(_explain_failure(done.stderr))
    reply: dict[str, Any] = json.loads(done.stdout)
    return reply


def _explain_failure(errors: str) -> str:
    """Return the sentence of an error of fedtune, else the last line."""
    lines = [line for line in errors.strip().splitlines() if line.strip()] or ["its process was killed"]
    name, _, sentence = lines[-1].partition(": ")
    return sentence if name.startswith("fedtune.errors.") else f"the plan's process failed ({lines[-1]})"


def explain_choice(chosen: Plan | None, smallest: Plan, request: PlanRequest) -> str:
    """Say in one sentence why a plan is recommended, or by how much none fits."""
    if chosen is None:
        missing = smallest.needed_bytes - request.budget
        return (
            f"nothing fits {_megabytes(request.budget)}: the smallest setting, {describe_plan(smallest)}, needs "
            f"{_megabytes(smallest.needed_bytes)}, {_megabytes(missing)} more; allow that, or lower --length or --batch"
        )
    exact = "exact gradients" if chosen.exact_gradients else "approximate gradients, as no exact one fits"
    by = (
        "the fewest operations"
        if request.time_weight == 1
        else f"the best balance at time weight {request.time_weight:g}"
    )
    return f"{describe_plan(chosen)} has {exact} and {by} of all that fit {_megabytes(request.budget)}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f} MB"
