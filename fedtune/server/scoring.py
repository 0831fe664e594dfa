"""What is scored when: validation examples, some or all, every so many rounds; all, and the test part, at the end."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from fedtune.seeds import derive_seed
from fedtune.server.events import Scoring, emit_event
from fedtune.tracking import MetricRecord
from fedtune.training import RunContext, evaluate_model, set_model_state

__all__ = ["scored_after", "test", "to_score", "validation"]

State = Mapping[str, Tensor]


def scored_after(shop: RunContext, number: int) -> bool:
    """Whether the validation part is scored after a round; after the last one it is, and whole."""
    return number % shop.recipe.evaluation.every_n_rounds == 0 or number == shop.recipe.federation.rounds


def to_score(shop: RunContext, first: int) -> dict[int, int]:
    """How many examples are scored after each round from ``first`` on; 0 stands for the start."""
    if shop.local_tensors:  # the state alone is no model
        return {}
    rounds, whole = shop.recipe.federation.rounds, len(shop.validation)
    some = whole if (rows := _some(shop)) is None else len(rows)
    numbers = [number for number in range(first, rounds) if scored_after(shop, number)]
    return dict.fromkeys(numbers, some) | {rounds: whole + 2 * len(shop.test)}


def validation(shop: RunContext, state: State, number: int) -> tuple[MetricRecord, ...]:
    """Scores on the validation part: before the last round on as many examples as the recipe names."""
    rows = None if number == shop.recipe.federation.rounds else _some(shop)
    return _scores(shop, state, "validation", "validation", rows)


def test(shop: RunContext, start: State, state: State) -> tuple[MetricRecord, ...]:
    """Scores on all of the test part, for the start and for the end."""
    return _scores(shop, start, "test", "test-before", None) + _scores(shop, state, "test", "test", None)


def _some(shop: RunContext) -> list[int] | None:
    """The same validation examples each time, drawn from the seed; None for all."""
    wanted, held = shop.recipe.evaluation.max_examples, len(shop.validation)
    if wanted is None or wanted >= held:
        return None
    order = np.random.default_rng(derive_seed(shop.recipe.seed, "validation")).permutation(held)
    return sorted(order[:wanted].tolist())


def _scores(shop: RunContext, state: State, part: str, called: str, rows: list[int] | None) -> tuple[MetricRecord, ...]:
    if shop.local_tensors:
        return ()
    set_model_state(shop.model, state)
    examples = getattr(shop, part)
    total = len(examples) if rows is None else len(rows)

    def told(done: int) -> None:
        emit_event(Scoring(called, done, total))

    told(0)
    scores = evaluate_model(shop.evaluated_model, examples, rows, told)
    return tuple(MetricRecord(part=called, domain=domain, name=name, value=value) for domain, name, value in scores)
