"""Decide what is scored when: the validation split, or a sample of it, in some rounds; the test split at the end."""

import json
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from fedtune.recipe.evaluation_settings import Prompt
from fedtune.seeds import derive_seed
from fedtune.server.events import Scoring, emit_event
from fedtune.tracking import MetricRecord, SampleRecord
from fedtune.training import RunContext, evaluate_model, set_model_state

__all__ = ["scored_after", "test", "to_score", "validation", "write_samples"]

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
    rounds, whole = context.recipe.federation.rounds, len(context.validation)
    some = whole if (rows := _some(context)) is None else len(rows)
    numbers = [round_number for round_number in range(first, rounds) if scored_after(context, round_number)]
    return dict.fromkeys(numbers, some) | {rounds: whole + 2 * len(context.test)}


def validation(context: RunContext, state: State, round_number: int) -> tuple[MetricRecord, ...]:
    """Return scores on the validation split; before the last round, on at most ``evaluation.max_examples``."""
    rows = None if round_number == context.recipe.federation.rounds else _some(context)
    return _scores(context, state, "validation", "validation", rows)


def test(context: RunContext, start: State, state: State) -> tuple[MetricRecord, ...]:
    """Return scores on the whole test split, of the start state and of the last state."""
    return _scores(context, start, "test", "test-before", None) + _scores(context, state, "test", "test", None)


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
    return tuple(MetricRecord(split=called, domain=domain, name=name, value=value) for domain, name, value in scores)
