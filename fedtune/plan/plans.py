"""Plans: settings with their predicted cost, and the choice among them. Nothing here imports torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fedtune.plan.prediction import Runtime, predict_memory
from fedtune.plan.settings_trace import BatchTrace, SettingsTrace
from fedtune.recipe.train_settings import Train

__all__ = ["Plan", "choose_plan", "correct_plan", "describe_plan", "keep_pareto_set", "list_plans"]


class Plan(NamedTuple):
    """Settings and what they cost. ``relative_time`` counts operations, 1 for the fewest of all plans."""

    name: str
    techniques: list[Any]
    dtype: str
    micro_batch: int
    exact_gradients: bool
    kept_bytes: int
    peak_bytes: int
    anonymous_bytes: int
    total_bytes: int
    needed_bytes: int
    relative_time: float
    up_bytes: int
    down_bytes: int

    @property
    def bytes_per_round(self) -> int:
        """What one device sends and receives in a round."""
        return self.up_bytes + self.down_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return self._asdict() | {"bytes_per_round": self.bytes_per_round}


def list_plans(traces: Sequence[SettingsTrace], runtimes: Mapping[str, Runtime], train: Train) -> list[Plan]:
    """Return a plan for each trace that worked and each size of micro-batches, the cheapest in time first."""
    made = [
        (trace, batch, predict_memory(trace, batch, runtimes[trace.runtime], train.optimiser, train.momentum))
        for trace in traces
        if trace.error is None
        for batch in _list_micro_batches(trace.batches)
    ]
    times = [_count_operations(trace, batch) for trace, batch, _ in made]
    fewest = min(times, default=1.0) or 1.0
    plans = [
        Plan(
            trace.name,
            trace.techniques,
            trace.dtype,
            batch.examples,
            trace.exact_gradients,
            batch.kept_bytes,
            batch.peak_bytes,
            *needed,
            round(time / fewest, 4),
            trace.up_bytes,
            trace.down_bytes,
        )
        for (trace, batch, needed), time in zip(made, times, strict=True)
    ]
    return sorted(plans, key=_rank_time)


def _list_micro_batches(batches: Sequence[BatchTrace]) -> Iterator[BatchTrace]:
    """Yield the whole batch and its halves. Between two traces, a peak is at most on the line between them.

    A peak is the largest of several numbers that are affine in the examples, so it is convex.
    """
    few, many = batches[0], batches[-1]
    size = many.examples
    while size > few.examples:
        yield _interpolate(few, many, size)
        size //= 2
    yield few


def _interpolate(few: BatchTrace, many: BatchTrace, size: int) -> BatchTrace:
    share = (size - few.examples) / (many.examples - few.examples)

    def interpolate_count(a: int, b: int) -> int:
        return round(a + share * (b - a))

    return BatchTrace(
        examples=size,
        kept_bytes=interpolate_count(few.kept_bytes, many.kept_bytes),
        peak_bytes=interpolate_count(few.peak_bytes, many.peak_bytes),
        step_bytes=interpolate_count(few.step_bytes, many.step_bytes),
        flops=interpolate_count(few.flops, many.flops),
    )


_SPLIT_COST = 0.02
"""The share of a step's time that each further micro-batch adds, for reading the weights again."""


def _count_operations(trace: SettingsTrace, batch: BatchTrace) -> float:
    """Return the operations of a whole batch."""
    parts = -(-trace.batches[-1].examples // batch.examples)
    return trace.batches[-1].flops * (1 + _SPLIT_COST * (parts - 1))


def _rank_time(plan: Plan) -> tuple[Any, ...]:
    return plan.relative_time, plan.needed_bytes, -plan.micro_batch


def correct_plan(plan: Plan, factor: float) -> Plan:
    """Return the plan for processes that hold ``factor`` times the predicted anonymous memory."""
    added = round(plan.anonymous_bytes * factor) - plan.anonymous_bytes
    more = {name: getattr(plan, name) + added for name in ("anonymous_bytes", "total_bytes", "needed_bytes")}
    return plan._replace(**more)


def keep_pareto_set(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans that no other plan beats: none needs less memory, time and bytes with gradients as exact."""
    return [plan for plan in plans if not any(_beats(other, plan) for other in plans)]


def _beats(one: Plan, other: Plan) -> bool:
    costs = [_list_costs(plan) for plan in (one, other)]
    return all(a <= b for a, b in zip(*costs, strict=True)) and costs[0] != costs[1]


def _list_costs(plan: Plan) -> tuple[float, ...]:
    return (
        plan.needed_bytes,
        plan.relative_time,
        plan.bytes_per_round,
        not plan.exact_gradients,
        plan.dtype != "float32",
    )


def choose_plan(plans: Sequence[Plan], budget: int, time_weight: float) -> Plan | None:
    """Return the best plan that fits a budget, None if none does.

    Exact gradients and single precision come first. Then the plan with the lowest product of time ** ``time_weight``
    and memory ** (1 - ``time_weight``) is chosen: by time alone for 1.
    """
    fitting = [plan for plan in plans if plan.needed_bytes <= budget]
    return min(fitting, key=lambda plan: _rank_choice(plan, time_weight), default=None)


def _rank_choice(plan: Plan, time_weight: float) -> tuple[Any, ...]:
    cost = plan.relative_time**time_weight * plan.needed_bytes ** (1 - time_weight)
    return not plan.exact_gradients, plan.dtype != "float32", cost, plan.needed_bytes


def describe_plan(plan: Plan) -> str:
    """Name a plan's settings."""
    dtype = "" if plan.dtype == "float32" else f" in {plan.dtype}"
    return f"{plan.name}{dtype} with micro-batches of {plan.micro_batch}"
