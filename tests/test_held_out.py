"""What clients hold out: it is scored before they train, and never trained on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedtune.data import EncodedDataset
from fedtune.seeds import derive_seed
from fedtune.training import ClientRound, get_model_state, get_run_context, set_model_state, train_local_model
from fedtune.training.holdout_split import split_holdout
from tests.federations import execute, trivial

SHARE = "evaluation.local_holdout=0.3"


class Watched:
    """Encoded examples that remember which of them were asked for while gradients were taken."""

    def __init__(self, data: EncodedDataset) -> None:
        self._data, self.domains, self.lengths = data, data.domains, data.lengths
        self.trained: set[int] = set()
        self.scored: set[int] = set()

    def __len__(self) -> int:
        return len(self._data)

    def make_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        (self.trained if torch.is_grad_enabled() else self.scored).update(indices)
        return self._data.make_batch(indices)


@pytest.mark.parametrize(
    ("count", "share", "wanted"), [(10, 0.3, 3), (3, 0.3, 0), (4, 0.3, 1), (1, 0.5, 0), (2, 0.5, 1)]
)
def test_a_share_rounded_down_is_held_out_and_the_rest_kept(count: int, share: float, wanted: int) -> None:
    rows = np.arange(100, 100 + count)
    kept, held = split_holdout(rows, share, 5)
    assert len(held) == wanted
    assert sorted([*kept, *held]) == rows.tolist()
    assert [kept.tolist(), held.tolist()] == [sorted(kept), sorted(held)]


def test_without_a_share_rows_stay_as_they_are() -> None:
    rows = np.array([4, 2, 9])
    assert split_holdout(rows, 0.0, 1)[0] is rows


def test_each_seed_holds_out_other_rows() -> None:
    drawn = {tuple(split_holdout(np.arange(30), 0.2, seed)[1]) for seed in range(60)}
    assert len(drawn) > 50
    assert set().union(*drawn) == set(range(30))


def test_held_out_examples_are_never_trained_on_and_scored_as_by_hand() -> None:
    shop = get_run_context(trivial(SHARE, "train={steps: null, epochs: 2}").model_dump_json())
    recipe, rows, client = shop.recipe, shop.client_rows[2], 2
    kept, held = split_holdout(rows, 0.3, derive_seed(recipe.seed, client, "own"))
    state = {name: torch.randn_like(tensor) for name, tensor in get_model_state(shop.model, shop.shared_names).items()}
    for number in (1, 2):
        watched = Watched(shop.train)
        got = train_local_model(ClientRound(shop.model, shop.techniques, recipe, watched, rows, number, client), state)
        assert watched.trained == set(kept.tolist())
        assert watched.scored == set(held.tolist())
        set_model_state(shop.model, state)
        batch = shop.train.make_batch(held.tolist())
        with torch.no_grad():
            logits = shop.model(pixel_values=batch["pixel_values"]).logits
        assert got.holdout_metrics.num_predictions == len(held)
        assert got.holdout_metrics.accuracy == pytest.approx(
            float((logits.argmax(1) == batch["labels"]).float().mean())
        )
        assert got.holdout_metrics.loss == pytest.approx(float(F.cross_entropy(logits, batch["labels"])), rel=1e-5)


def test_a_run_records_what_clients_report_beside_the_central_figures(home: Path) -> None:
    ended = execute(trivial(SHARE))
    for record in ended.rounds[1:]:
        parts = {metric.split for metric in record.metrics}
        assert {"local", "validation"} <= parts
    assert not any(metric.split == "local" for metric in ended.rounds[0].metrics)


def test_no_figure_is_recorded_when_no_client_can_hold_anything_out(home: Path) -> None:
    ended = execute(trivial("evaluation.local_holdout=0.01", "data.max_train_examples=40"))
    assert not any(metric.split == "local" for record in ended.rounds for metric in record.metrics)
