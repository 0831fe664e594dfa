"""Decide what is scored when: the validation split, or a sample of it, in some rounds; the test split at the end."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from fedtune.recipe.evaluation_settings import Prompt
from fedtune.seeds import derive_seed
from fedtune.server.events import Scoring, emit_event
from fedtune.server.stream_scoring import list_border_tasks, list_scored_tasks, score_tasks, select_task_rows
from fedtune.tracking import MetricRecord, SampleRecord
from fedtune.training import RunContext, evaluate_model, set_model_state

__all__ = ["score_border", "scored_after", "test", "to_score", "validation", "write_samples"]

State = Mapping[str, Tensor]


def scored_after(context: RunContext, round_number: int) -> bool:
    """Whether the validation split is scored after a round. After the last round, it always is."""
    return (
        round_number % context.recipe.evaluation.every_n_rounds == 0 or round_number == context.recipe.federation.rounds
    )


def to_score(context: RunContext, first: int) -> dict[int, int]:
    """Return the number of examples that are scored after each round from ``first`` on; round 0 is the start."""
    if context.local_tensors:  # the state alone is not a whole model
        return {}
    if context.stream_plan is not None:
        return _to_score_in_stream(context, first)
    rounds, whole = context.recipe.federation.rounds, len(context.validation)
    some = whole if (rows := _some(context)) is None else len(rows)
    numbers = [round_number for round_number in range(first, rounds) if scored_after(context, round_number)]
    return dict.fromkeys(numbers, some) | {rounds: whole + 2 * len(context.test)}


def _to_score_in_stream(context: RunContext, first: int) -> dict[int, int]:
    """Return the number of examples of the tasks that are scored after each round, and of all tests at borders."""
    last, found = context.recipe.federation.rounds, dict[int, int]()
    for number in range(first, last + 1):
        rows = _select_rows(context, number) if scored_after(context, number) else {}
        tests = _select_border_rows(context, number)
        found[number] = sum(map(len, rows.values())) + sum(map(len, tests.values())) * (2 if number == last else 1)
    return {number: count for number, count in found.items() if count}


def validation(context: RunContext, state: State, round_number: int) -> tuple[MetricRecord, ...]:
    """Return scores on the validation split; before the last round, on at most ``evaluation.max_examples``.

    In a stream, these are the tasks begun so far.
    """
    if context.stream_plan is not None:
        return _score_stream(context, state, "validation", "validation", _select_rows(context, round_number))
    rows = None if round_number == context.recipe.federation.rounds else _some(context)
    return _scores(context, state, "validation", "validation", rows)


def test(context: RunContext, start: State, state: State) -> tuple[MetricRecord, ...]:
    """Return scores on the whole test split, of the start state and of the last state."""
    if context.stream_plan is not None:
        rows = _select_border_rows(context, context.recipe.federation.rounds)
        before = _score_stream(context, start, "test", "test-before", rows)
        return before + _score_stream(context, state, "test", "test", rows)
    return _scores(context, start, "test", "test-before", None) + _scores(context, state, "test", "test", None)


def score_border(context: RunContext, state: State, round_number: int) -> tuple[MetricRecord, ...]:
    """Return scores on the test split of each task, at the start of a stream and when a task has ended."""
    rows = _select_border_rows(context, round_number)
    return _score_stream(context, state, "test", "border", rows) if rows else ()


def _select_rows(context: RunContext, round_number: int) -> dict[int, list[int]]:
    some = None if round_number == context.recipe.federation.rounds else _some(context)
    return select_task_rows(context, "validation", list_scored_tasks(context, round_number), some)


def _select_border_rows(context: RunContext, round_number: int) -> dict[int, list[int]]:
    plan = context.stream_plan
    if plan is None or (round_number and plan.find_border(round_number) is None):
        return {}
    return select_task_rows(context, "test", list_border_tasks(context, round_number), None)


def _score_stream(
    context: RunContext, state: State, part: str, called: str, rows: Mapping[int, Sequence[int]]
) -> tuple[MetricRecord, ...]:
    if context.local_tensors:
        return ()
    set_model_state(context.model, state)
    total = sum(map(len, rows.values()))
    emit_event(Scoring(called, 0, total))
    scores = score_tasks(context, part, rows, lambda done: emit_event(Scoring(called, done, total)))
    return tuple(
        MetricRecord(split=called, domain=domain, name=name, value=value, device_type=context.device.type)
        for domain, name, value in scores
    )


def write_samples(context: RunContext, state: State) -> tuple[SampleRecord, ...]:
    """Return what the model of a state generates for the prompts of the recipe. Each state draws the same numbers."""
    prompts = context.recipe.evaluation.prompts
    if not prompts:
        return ()
    set_model_state(context.model, state)
    pairs = zip(prompts, context.generate_samples(), strict=True)
    return tuple(
        SampleRecord(number=number, prompt=_as_text(prompt), text=found.text, ended=found.ended)
        for number, (prompt, found) in enumerate(pairs, 1)
    )


def _as_text(prompt: Prompt) -> str:
    """A conversation is written as JSON."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([message.model_dump() for message in prompt], ensure_ascii=False)


def _some(context: RunContext) -> list[int] | None:
    """Return the rows of the sampled validation examples, which are the same in every round; None for all."""
    wanted, held = context.recipe.evaluation.max_examples, len(context.validation)
    if wanted is None or wanted >= held:
        return None
    order = np.random.default_rng(derive_seed(context.recipe.seed, "validation")).permutation(held)
    return sorted(order[:wanted].tolist())


def _scores(
    context: RunContext, state: State, part: str, called: str, rows: list[int] | None
) -> tuple[MetricRecord, ...]:
    if context.local_tensors:
        return ()
    set_model_state(context.model, state)
    examples = getattr(context, part)
    total = len(examples) if rows is None else len(rows)

    def told(done: int) -> None:
        emit_event(Scoring(called, done, total))

    told(0)
    scores = evaluate_model(context.evaluated_model, examples, rows, told)
    return tuple(
        MetricRecord(split=called, domain=domain, name=name, value=value, device_type=context.device.type)
        for domain, name, value in scores
    )
