"""The settings of late answers: what they mean in figures, and what they are refused with."""

from pathlib import Path

import pytest
import torch

from fedtune.cli.runs_view import show_run
from fedtune.errors import RecipeError
from fedtune.merging import compute_staleness_weight
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.simulation import resolve_recipe
from fedtune.tracking import Store
from fedtune.wire.client_update import ClientUpdate, pack
from tests.federations import WORDS, trivial
from tests.store_examples import a_client_record, a_round, start


@pytest.mark.parametrize(
    ("tau", "exponent", "scale"), [(0, 0.5, 1.0), (3, 0.5, 0.5), (1, 1.0, 0.5), (8, 0.5, 1 / 3), (7, 0.0, 1.0)]
)
def test_staleness_scales_by_a_power_of_one_more_than_the_rounds(tau: int, exponent: float, scale: float) -> None:
    assert compute_staleness_weight(tau, exponent) == pytest.approx(scale, rel=1e-15)


def test_a_scaled_contribution_reads_scaled_and_one_of_scale_one_bit_equal(tmp_path: Path) -> None:
    delta = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    (tmp_path / "sent").write_bytes(pack({"weight": delta}))
    assert torch.equal(ClientUpdate(0, 5, tmp_path / "sent").read_rows("weight", 1, 4), delta[1:4])
    halved = ClientUpdate(0, 5, tmp_path / "sent", scale=0.5)
    assert torch.equal(halved.read_rows("weight", 1, 4), delta[1:4] / 2)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["train.techniques=[dynamic-pruning]"], "dynamic-pruning trains other tensors each round"),
        (["merge=[rebasin, mean]"], "rebasin wants the models of one round"),
        (["merge=[mean, bias-calibration]"], "bias-calibration wants the models of one round"),
        (["merge=[mean, aim: {statistics: clients}]"], "aim wants the models of one round"),
        (["evaluation.local_holdout=0.2"], "clients score the model they begin with"),
        (
            ["train.techniques=[full, batch-norm-statistics: {local: true}]", "evaluation.local_holdout=0.2"],
            "leaves the server no whole",
        ),
    ],
)
def test_what_needs_the_models_of_one_round_is_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        trivial("federation.asynchronous.buffer_size=2", *overrides)


def adapted(lora: str, merge: str) -> Recipe:
    overrides = (
        "federation.asynchronous.buffer_size=2",
        f"train.techniques=[lora: {{exact: {lora}}}]",
        f"merge=[{merge}]",
    )
    return resolve_recipe(parse_recipe(WORDS.format(folder="nowhere"), "words", overrides))


def test_an_alternating_factor_is_refused_and_a_frozen_one_is_not() -> None:
    with pytest.raises(RecipeError, match=r"lora trains other tensors each round, .*; set trained_factors: b-only"):
        adapted("alternate", "mean")
    with pytest.raises(RecipeError, match="fedit wants the models of one round"):
        adapted("none", "fedit")
    adapted("freeze-a", "mean")
    trivial(
        "federation.asynchronous.buffer_size=2", "merge=[mean, aim]"
    )  # measured by the server, of the model it merges into


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["federation.asynchronous.buffer_size=5"], "federation.asynchronous.buffer_size is 5, above the 4 clients"),
        (
            ["federation.asynchronous.buffer_size=2", "federation.quorum=3"],
            "quorum is 3, but asynchronous.buffer_size ends a round with 2",
        ),
        (["federation.asynchronous.buffer_size=0"], "buffer"),
        (["federation.asynchronous.staleness_exponent=-1", "federation.asynchronous.buffer_size=2"], "staleness"),
    ],
)
def test_settings_that_do_not_hold_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        trivial(*overrides)


def test_lateness_is_shown_where_there_can_be_any(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Store.open() as store:
        start(store)
        store.commit_round("film-1a2b", a_round(0))
        late = tuple(a_client_record(client, staleness=3 * client) for client in range(2))
        store.commit_round("film-1a2b", a_round(1, client_records=late))
        rounds = store.rounds("film-1a2b")
        assert [one.staleness for one in rounds[1].client_records] == [0, 3]
        show_run(store.run("film-1a2b"), rounds)
        assert "1.5, at most 3" in " ".join(capsys.readouterr().out.split())
        show_run(store.run("film-1a2b"), [a_round(1)])
        assert "late" not in capsys.readouterr().out
