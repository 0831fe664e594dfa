"""Device classes with settings of their own: what each is sent, trains and adds to the shared state."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune import checkpoint, techniques
from fedtune import paths as homes
from fedtune.device.client_app import app
from fedtune.errors import RecipeError
from fedtune.merging import pad_to_rank, truncate_to_rank
from fedtune.recipe.schema import Recipe
from fedtune.simulation.workers import ProcessPoolWorkers
from fedtune.training import (
    ClientRound,
    LocalTrainingResult,
    RunContext,
    clear_run_context,
    get_model_state,
    get_run_context,
    set_run_context,
    train_local_model,
)
from fedtune.wire.client_update import LowRankPair
from tests.federations import execute, trivial, words

D, K, WIDE, NARROW = 7, 5, 4, 2
PAIR = LowRankPair("up", "down", 2.0)
OWN = LowRankPair("up", "down", 8.0)
SHAPES = {"up": (D, WIDE), "down": (WIDE, K), "head": (3,)}
NARROWED = {"up": (D, NARROW), "down": (NARROW, K), "head": (3,)}
pytestmark = pytest.mark.usefixtures("home")

CLASSES = "devices=[{name: laptop, count: 2}, {name: phone, count: 1, %s}]"


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}


def product(scale: float, up: Tensor, down: Tensor) -> Tensor:
    return scale * up @ down


def test_a_narrower_client_is_given_the_first_terms_of_the_product() -> None:
    state = drawn(SHAPES, 0)
    own = truncate_to_rank(state, NARROWED, [PAIR], [OWN])
    first = product(2.0, state["up"][:, :NARROW], state["down"][:NARROW])
    torch.testing.assert_close(product(8.0, own["up"], own["down"]), first)
    assert torch.equal(own["head"], state["head"])


def test_its_product_and_the_terms_it_never_had_add_up() -> None:
    state, deltas = drawn(SHAPES, 0), drawn(NARROWED, 1)
    own = truncate_to_rank(state, NARROWED, [PAIR], [OWN])
    back = pad_to_rank(deltas, SHAPES, [PAIR], [OWN])
    found = product(2.0, state["up"] + back["up"], state["down"] + back["down"])
    trained = product(8.0, own["up"] + deltas["up"], own["down"] + deltas["down"])
    rest = product(2.0, state["up"][:, NARROW:], state["down"][NARROW:])
    torch.testing.assert_close(found, trained + rest)
    assert torch.equal(back["head"], deltas["head"])


def test_equal_ranks_and_scales_change_no_bit() -> None:
    state = drawn(SHAPES, 0)
    for found in (truncate_to_rank(state, SHAPES, [PAIR], [PAIR]), pad_to_rank(state, SHAPES, [PAIR], [PAIR])):
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def start(recipe: Recipe) -> tuple[RunContext, dict[str, Tensor]]:
    clear_run_context()
    shop = get_run_context(recipe.model_dump_json())
    clear_run_context()
    return shop, get_model_state(shop.model, shop.shared_names)


def alone(recipe: Recipe, client: int, state: dict[str, Tensor]) -> LocalTrainingResult:
    """What a client makes of a state, by a workshop that knows no other class."""
    clear_run_context()
    shop = get_run_context(recipe.get_client_recipe(client).model_dump_json())
    clear_run_context()
    return train_local_model(
        ClientRound(shop.model, shop.techniques, shop.recipe, shop.train, shop.client_rows[client], 1, client), state
    )


def ended(recipe: Recipe) -> dict[str, Tensor]:
    """The state after round 1."""
    found = execute(recipe).rounds[-1].checkpoint
    assert found is not None
    return checkpoint.read_checkpoint(homes.get_runs_folder() / found.path)


@pytest.fixture
def partly(tmp_path: Path) -> Recipe:
    return words(tmp_path, "train.techniques=full", CLASSES % "techniques: head-only", "federation.rounds=1")


def test_a_tensor_is_merged_over_those_who_trained_it(partly: Recipe) -> None:
    _, state = start(partly)
    done = [alone(partly, client, state) for client in range(3)]
    assert done[2].delta.keys() < done[0].delta.keys()
    merged = ended(partly)
    for name, before in state.items():
        sent = [(one.num_examples, one.delta[name]) for one in done if name in one.delta]
        mean = sum(count * delta for count, delta in sent) / sum(count for count, _ in sent)
        torch.testing.assert_close(merged[name], before + mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("exact", "merge"), [("alternate", "mean"), ("none", "flexlora"), ("remainder", "fedex-lora")])
def test_ranks_may_differ(tmp_path: Path, exact: str, merge: str) -> None:
    def lora(rank: int) -> str:
        return f"[{{lora: {{rank: {rank}, exact: {exact}}}}}]"

    recipe = words(
        tmp_path,
        f"train.techniques={lora(4)}",
        CLASSES % f"techniques: {lora(2)}",
        "federation.rounds=1",
        f"merge=[{merge}]",
    )
    shop, state = start(recipe)
    pair = next(iter(techniques.list_low_rank_pairs(shop.techniques, shop.model)))
    part = shop.for_client(2)
    own = next(iter(techniques.list_low_rank_pairs(part.techniques, part.model)))
    assert (pair.scale, own.scale) == (4.0, 8.0)
    total = torch.zeros(16, 16, dtype=torch.float64)
    examples = 0
    for client in range(3):
        begun, scale = (narrowed_state(shop, part, state), own.scale) if client == 2 else (state, pair.scale)
        done = alone(recipe, client, begun)
        after = {name: tensor + done.delta.get(name, 0) for name, tensor in begun.items()}
        total += done.num_examples * product(scale, after[pair.left].double(), after[pair.right].double())
        examples += done.num_examples
    merged = ended(recipe)
    found = product(pair.scale, merged[pair.left].double(), merged[pair.right].double())
    if pair.base is not None:
        found += merged[pair.base] - state[pair.base]
    kept = total / examples
    if merge == "flexlora":  # of the sum of three products the shared rank holds the leading four terms
        u, s, v = torch.linalg.svd(kept)
        kept = u[:, :4] * s[:4] @ v[:4]
    torch.testing.assert_close(found, kept, rtol=1e-4, atol=1e-7)


def narrowed_state(shop: RunContext, part: RunContext, state: dict[str, Tensor]) -> dict[str, Tensor]:
    shapes = {name: tuple(tensor.shape) for name, tensor in get_model_state(part.model, shop.shared_names).items()}
    pairs = [techniques.list_low_rank_pairs(each.techniques, each.model) for each in (shop, part)]
    return truncate_to_rank(state, shapes, *pairs)


def test_worker_processes_give_the_same_bits(partly: Recipe) -> None:
    in_turn = execute(partly, app, "in-turn").hashes
    clear_run_context()
    shop = get_run_context(partly.model_dump_json())
    pool = ProcessPoolWorkers(shop, 1)
    set_run_context(shop)
    assert execute(partly, pool, "pool").hashes == in_turn


def test_a_class_may_have_its_own_batch(tmp_path: Path) -> None:
    recipe = words(tmp_path, CLASSES % "batch: 2", "federation.rounds=1")
    sent = execute(recipe).rounds[-1].client_records
    assert [one.num_examples for one in sent] == [8, 8, 4]


def test_a_class_may_have_its_own_precision(tmp_path: Path) -> None:
    recipe = words(tmp_path, CLASSES % "dtype: bfloat16", "federation.rounds=1")
    shop, _ = start(recipe)
    assert {p.dtype for p in shop.for_client(2).model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in shop.for_client(0).model.parameters()} == {torch.float32}
    assert execute(recipe).rounds[-1].status == "completed"


def refused(recipe: Recipe) -> str:
    clear_run_context()
    with pytest.raises(RecipeError) as caught:
        get_run_context(recipe.model_dump_json())
    return str(caught.value)


def test_a_class_without_a_place_for_what_is_shared_is_refused(tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=lora", CLASSES % "techniques: head-only")
    assert "techniques of phone leave no place for" in refused(recipe)


def test_a_class_that_trains_more_than_is_shared_is_refused(tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=head-only", CLASSES % "techniques: full")
    assert "which train.techniques does not share" in refused(recipe)


def test_a_wider_class_is_refused(tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=[{lora: {rank: 2}}]", CLASSES % "techniques: [{lora: {rank: 4}}]")
    assert "raise the rank there" in refused(recipe)


def test_factors_that_are_trained_in_different_rounds_are_refused(tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=lora", CLASSES % "techniques: [{lora: {trained_factors: b-only}}]")
    assert "different factors" in refused(recipe)


def test_a_merge_that_needs_every_model_whole_is_refused(tmp_path: Path) -> None:
    recipe = words(tmp_path, "train.techniques=full", CLASSES % "techniques: head-only", "merge=[sce]")
    assert "sce needs all of every model" in refused(recipe)


def test_masks_that_move_are_refused_beside_classes() -> None:
    devices = "devices=[{name: a, count: 2}, {name: b, count: 2, techniques: full}]"
    with pytest.raises(RecipeError, match="dynamic-pruning needs all devices to train alike"):
        trivial("train.techniques=[{dynamic-pruning: {extrusion: null}}]", devices)


def test_classes_with_settings_need_names_of_their_own() -> None:
    with pytest.raises(RecipeError, match="two classes are called a"):
        trivial("devices=[{name: a, count: 2}, {name: a, count: 2, batch: 4}]")


def test_settings_that_hold_nowhere_are_told_by_class() -> None:
    with pytest.raises(RecipeError, match="devices: b"):
        trivial("devices=[{name: a, count: 2}, {name: b, count: 2, techniques: gradient-checkpointing}]")
