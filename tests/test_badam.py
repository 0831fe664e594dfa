"""``badam``: blocks take turns, and the others neither move nor cost memory."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fedtune import techniques
from fedtune.errors import ModelError
from fedtune.techniques._block_sequence import find_blocks
from fedtune.techniques.badam import Badam
from tests.families import FAMILIES
from tests.federations import execute, words
from tests.technique_steps import chosen, gradients, shared


def trained_blocks(family: str, number: int, **settings: int) -> tuple[list[int], list[str]]:
    model, units = FAMILIES[family].model(), chosen("badam", **settings)
    techniques.apply_techniques(units, model, FAMILIES[family].task, 0)
    techniques.begin_round(units, model, number)
    inside = [any(one.requires_grad for one in block.parameters()) for block in find_blocks(model)]
    assert all(
        one.requires_grad == moves
        for block, moves in zip(find_blocks(model), inside, strict=True)
        for one in block.parameters()
    )
    of_blocks = {id(one) for block in find_blocks(model) for one in block.parameters()}
    others = [name for name, one in model.named_parameters() if one.requires_grad and id(one) not in of_blocks]
    return [place for place, moves in enumerate(inside) if moves], others


@pytest.mark.parametrize("family", FAMILIES)
def test_each_round_trains_one_block_in_turn_and_the_head(family: str) -> None:
    turns = [trained_blocks(family, number)[0] for number in range(1, 6)]
    assert turns == [[0], [1], [0], [1], [0]]
    assert [trained_blocks(family, number, rounds_per_block=2)[0] for number in range(1, 5)] == [[0], [0], [1], [1]]
    others = trained_blocks(family, 2)[1]
    assert bool(others) == FAMILIES[family].task.has_new_head
    assert all("embed" not in name for name in others)


def test_gradients_are_those_of_full_and_later_rounds_keep_less() -> None:
    plain = FAMILIES["bert"].model()
    shared("full", plain, FAMILIES["bert"].task)
    batch = FAMILIES["bert"].make_batch()
    wanted, whole = gradients(plain, batch)
    kept = []
    for number in (1, 2):
        model, units = FAMILIES["bert"].model(), chosen("badam")
        names = techniques.apply_techniques(units, model, FAMILIES["bert"].task, 0)
        techniques.begin_round(units, model, number)
        found, held = gradients(model, batch)
        assert found.keys() < wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)
        assert set(names) >= found.keys()
        kept.append(held)
    assert kept[1] < 0.75 * kept[0] < whole


def test_all_blocks_have_moved_after_a_turn_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    one, again = (
        execute(words(tmp_path, "train.techniques=[badam]", "federation.rounds=3"), run=run) for run in ("one", "again")
    )
    assert one.hashes == again.hashes
    assert len(set(one.hashes)) == 4


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of blocks to train in turn; take full"):
        Badam().rewrite_model(nn.Linear(2, 2), FAMILIES["llama"].task, 0)
