"""The choice among plans: what is dominated goes, exact gradients come first, and a budget is kept."""

import pytest

from fedtune.plan.plan_report import PlanRequest, explain_choice
from fedtune.plan.planned_recipe import apply_plan, format_planned_recipe
from fedtune.plan.plans import Plan, choose_plan, keep_pareto_set, list_plans
from fedtune.plan.prediction import HOT_BYTES, Runtime, predict_memory
from fedtune.plan.settings_trace import BatchTrace, SettingsTrace
from fedtune.recipe.schema import Train
from fedtune.recipe.yaml_file import parse_recipe
from tests.profile_examples import TEXT

MB = 10**6


def a_plan(needed: int, time: float = 1.0, *, exact: bool = True, dtype: str = "float32", sent: int = 10) -> Plan:
    memory = needed * MB
    return Plan("lora", ["lora"], dtype, 4, exact, 0, 0, memory, memory, memory, time, sent, sent)


def test_only_plans_that_no_other_beats_are_kept() -> None:
    small, fast, worse, rough = a_plan(100, 2.0), a_plan(300, 1.0), a_plan(300, 2.0), a_plan(90, 2.0, exact=False)
    assert keep_pareto_set([small, fast, worse, rough]) == [small, fast, rough]


def test_exact_gradients_come_before_time() -> None:
    rough, slow, fast = a_plan(50, 0.5, exact=False), a_plan(100, 2.0), a_plan(300, 1.0)
    assert choose_plan([rough, slow, fast], 400 * MB, 1.0) == fast
    assert choose_plan([rough, slow, fast], 400 * MB, 0.0) == slow
    assert choose_plan([rough, slow, fast], 200 * MB, 1.0) == slow
    assert choose_plan([rough, slow, fast], 60 * MB, 1.0) == rough
    assert choose_plan([rough, slow, fast], 40 * MB, 1.0) is None


def a_trace(*sizes: tuple[int, int]) -> SettingsTrace:
    batches = [
        BatchTrace(examples=n, kept_bytes=peak, peak_bytes=peak, step_bytes=peak + 3000, flops=100 * n)
        for n, peak in sizes
    ]
    return SettingsTrace(
        techniques=[{"lora": {"rank": 4}}],
        dtype="float32",
        runtime="torch",
        batches=batches,
        trained_values=1000,
        weight_bytes=70,
        mapped_bytes=500,
        shared_bytes=4000,
        up_bytes=1,
        down_bytes=2,
    )


def test_memory_is_the_sum_of_its_parts() -> None:
    trace, runtime = a_trace((4, 9000)), Runtime(10_000, 200)
    found = predict_memory(trace, trace.batches[0], runtime, "adamw", 0.0)
    assert found.anonymous_bytes == 10_000 + 70 + 2 * 4 * 1000 + 9000 + 3000 + (16 << 20)
    assert found.total_bytes - found.anonymous_bytes == 700
    assert found.needed_bytes == found.total_bytes
    large = predict_memory(trace, trace.batches[0], Runtime(0, HOT_BYTES), "sgd", 0.9)
    assert large.needed_bytes - large.anonymous_bytes == HOT_BYTES  # pages of weights can be dropped
    assert large.anonymous_bytes == 70 + 4 * 1000 + 9000 + 3000 + (16 << 20)


def test_the_fullest_moment_of_a_round_counts() -> None:
    """While a step runs, after its backward pass, or when the deltas are packed; a cut batch keeps all gradients."""
    runtime, started = Runtime(0, 0), 70 + (16 << 20)

    def count(peak: int, optimiser: str, examples: int = 4) -> int:
        trace = a_trace((1, peak), (4, peak))
        batch = next(one for one in trace.batches if one.examples == examples)
        return predict_memory(trace, batch, runtime, optimiser, 0.0).anonymous_bytes - started

    assert count(9000, "sgd") == 12_000
    assert count(0, "sgd") == 2 * 4000  # the delta and its copy
    assert count(0, "adamw") == 3 * 4000  # gradients and moments
    assert count(9000, "adamw") == 2 * 4000 + 12_000
    assert count(9000, "adamw", 1) == 2 * 4000 + 9000 + 4000


def test_micro_batches_halve_down_to_one_example() -> None:
    plans = list_plans([a_trace((1, 100), (12, 1200))], {"torch": Runtime(0, 0)}, Train(local_steps=1))
    assert [(plan.micro_batch, plan.peak_bytes) for plan in plans] == [(12, 1200), (6, 600), (3, 300), (1, 100)]
    assert [plan.relative_time for plan in plans] == [1.0, 1.02, 1.06, 1.22]
    assert plans[0].name == "lora(rank=4)"


def test_a_whole_batch_is_not_cut() -> None:
    plans = list_plans([a_trace((12, 1200))], {"torch": Runtime(0, 0)}, Train(local_steps=1))
    assert [plan.micro_batch for plan in plans] == [12]


def test_the_reason_says_what_is_missing() -> None:
    recipe = parse_recipe(TEXT.format(folder="model"), "tiny")
    request = PlanRequest(recipe, 256 * MB)
    told = explain_choice(None, a_plan(300), request)
    assert told.startswith(
        "nothing fits 256 MB: the smallest setting, lora with micro-batches of 4, needs 300 MB, 44 MB"
    )
    assert "exact gradients and the fewest operations" in explain_choice(a_plan(200), a_plan(200), request)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_planned_recipe_is_read_again(dtype: str) -> None:
    recipe = parse_recipe(TEXT.format(folder="model"), "tiny")
    plan = a_plan(200, dtype=dtype)
    text = format_planned_recipe(recipe, plan, 256 * MB)
    again = parse_recipe(text, "planned")
    assert again == apply_plan(recipe, plan)
    assert (again.train.batch_size, again.model.dtype, again.train.techniques[0].name) == (4, dtype, "lora")
    assert text.startswith("# Planned for 256 MB: lora, predicted peak 200 MB anonymous")
