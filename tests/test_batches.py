import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtune.training import total_steps
from fedtune.training.batches import batches
from tests.tiny import a_training_recipe


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize(("examples", "batch"), [(10, 4), (12, 4), (3, 8), (1, 1), (75, 4)])
def test_batches_cover_each_epoch_exactly_once(examples: int, batch: int, by_length: bool) -> None:
    indices = np.arange(examples) * 3 + 1
    lengths = torch.arange(400).flip(0) % 7 if by_length else None
    per_epoch = math.ceil(examples / batch)
    drawn = list(batches(indices, batch, 3 * per_epoch, seed=5, lengths=lengths))
    epochs = [drawn[start : start + per_epoch] for start in range(0, len(drawn), per_epoch)]
    for epoch in epochs:
        assert sorted(index for chosen in epoch for index in chosen) == indices.tolist()
        assert [len(chosen) for chosen in epoch[:-1]] == [batch] * (per_epoch - 1)
    assert examples < 10 or epochs[0] != epochs[1]


def test_batches_stop_in_the_middle_of_an_epoch_and_depend_on_the_seed_alone() -> None:
    indices = np.arange(40)
    five = list(batches(indices, 4, 5, seed=1))
    assert len(five) == 5
    assert list(batches(indices, 4, 13, seed=1))[:5] == five
    assert list(batches(indices, 4, 5, seed=2)) != five


def test_batches_by_length_hold_texts_of_like_length() -> None:
    lengths = torch.randint(1, 50, (64,), generator=torch.Generator().manual_seed(0))

    def padding(of: Tensor | None) -> int:
        chosen = [lengths[batch] for batch in batches(np.arange(64), 4, 16, seed=3, lengths=of)]
        return sum(int(len(row) * row.max() - row.sum()) for row in chosen)

    assert padding(lengths) < padding(None) / 3


@pytest.mark.parametrize(
    ("settings", "examples", "steps"),
    [
        ({"local_steps": 7}, 3, 7),
        ({"local_epochs": 1}, 8, 2),
        ({"local_epochs": 1}, 9, 3),
        ({"local_epochs": 3}, 9, 9),
        ({"local_epochs": 2}, 1, 2),
    ],
)
def test_steps_of_a_round(settings: dict[str, int], examples: int, steps: int) -> None:
    assert total_steps(examples, a_training_recipe(**settings)) == steps
