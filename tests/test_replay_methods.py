"""The methods replay, der and a-gem: what they store, draw and add to a step."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.continual._buffer import hash_example
from fedtune.continual._method import MethodSetup
from fedtune.continual._rehearsal import open_memory
from fedtune.continual._replay_store import ReplayStore, read_store, write_store
from fedtune.continual._stored_rows import pack_examples
from fedtune.continual.a_gem import project_gradients
from fedtune.errors import DataError, MemoryBudgetError, RecipeError
from fedtune.recipe.schema import Recipe, Unit
from fedtune.recipe.unit_registry import build_unit
from fedtune.training import ClientRound, get_run_context
from fedtune.training.stream_training import mask_trained_classes
from fedtune.training.training_step import run_step
from tests.replay_rounds import CLIENT, begin_client, make_recipe, read_files, train_client
from tests.streams import resolve_stream

pytestmark = pytest.mark.usefixtures("home")

METHODS = ("replay", "der", "a-gem")


def select(files: dict[str, Tensor], method: str) -> ReplayStore:
    return read_store({name.removeprefix(f"{method}/"): one for name, one in files.items() if name.startswith(method)})


def test_a_store_is_read_as_it_was_written() -> None:
    store = ReplayStore(99, [b"one", b"", b"three"], [3, 0, 3], {3: bytes(range(32)), 5: bytes(32)}, torch.eye(3))
    again = read_store(write_store(store))
    assert (again.budget, again.contents, again.groups, again.limits) == (99, store.contents, [3, 0, 3], store.limits)
    assert again.outputs is not None
    assert torch.equal(again.outputs, torch.eye(3))
    assert read_store(write_store(ReplayStore(0))) == ReplayStore(0, [], [], {})


@pytest.mark.parametrize("name", ["replay", "a-gem"])
def test_what_is_stored_is_the_smallest_keys_of_each_class(name: str, tmp_path: Path) -> None:
    """A slow twin over the rows of both tasks, whatever was dropped in between."""
    recipe = make_recipe({name: {"bytes": 3_000}})
    train_client(recipe, tmp_path, 1, 2, 3, 4)
    store = select(read_files(tmp_path)[1], name)
    context = get_run_context(recipe.model_dump_json())
    rows = [row for row in context.client_rows[CLIENT].tolist() if context.task_numbers[row] in (0, 1)]
    size = len(pack_examples(context.train, [0])[0]) + 8
    room = (3_000 - 4 * 36) // size
    contents = pack_examples(context.train, rows)
    keyed = sorted((hash_example(recipe.seed, CLIENT, content), content) for content in contents)
    labels = dict(zip(contents, [int(context.train.make_batch([row])["labels"]) for row in rows], strict=True))
    counts = {label: room // 4 + (label < room % 4) for label in range(4)}
    expected = [
        content
        for place, (_, content) in enumerate(keyed)
        if sum(labels[one] == labels[content] for _, one in keyed[:place]) < counts[labels[content]]
    ]
    assert list(store.contents) == expected
    assert sum(len(content) for content in store.contents) < 3_000


def test_a_share_is_of_all_examples_and_every_class_has_one(tmp_path: Path) -> None:
    context = get_run_context(make_recipe("replay").model_dump_json())
    rows = len(context.client_rows[CLIENT])
    for share, expected in (("10%", rows // 10), (0.001, 10)):
        recipe = make_recipe({"replay": {"share": share}})
        train_client(recipe, tmp_path / str(share), *range(1, 11))
        store = select(read_files(tmp_path / str(share))[4], "replay")
        assert abs(len(store.contents) - expected) <= 3
        assert sorted(set(store.groups)) == list(range(10))


def test_domains_and_reservoir_keep_by_task_and_a_plain_sample(tmp_path: Path) -> None:
    for keep, expected in (("domains", {0, 1}), ("reservoir", {0})):
        recipe = make_recipe({"replay": {"bytes": 4_000, "keep": keep}})
        train_client(recipe, tmp_path / keep, 1, 2, 3, 4)
        store = select(read_files(tmp_path / keep)[1], "replay")
        assert set(store.groups) == expected
    counts = Counter(select(read_files(tmp_path / "domains")[1], "replay").groups)
    assert abs(counts[0] - counts[1]) <= 1


@pytest.mark.parametrize("name", METHODS)
def test_a_round_begun_again_stores_and_sends_the_same(name: str, tmp_path: Path) -> None:
    """Also after the files of the visit are there already."""
    recipe = make_recipe({name: {"share": 0.2}})
    train_client(recipe, tmp_path, 1, 2)
    first = train_client(recipe, tmp_path, 3)
    kept = read_files(tmp_path)
    again = train_client(recipe, tmp_path, 3)
    for one, other in ((first, again), (kept[1], read_files(tmp_path)[1])):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_first_task_is_trained_as_without_replay(tmp_path: Path) -> None:
    alone = train_client(make_recipe(), tmp_path / "naive", 1)
    for name in METHODS:
        found = train_client(make_recipe(name), tmp_path / name, 1)
        assert all(torch.equal(tensor, alone[key]) for key, tensor in found.items()), name


Step = tuple[Any, Any, dict[str, Tensor], list[int]]


def take_step(recipe: Recipe, number: int, stored: dict[int, dict[str, Tensor]], micro: int | None = None) -> Step:
    """One training step: the client, its method, the gradients before the hook that changes them, and the rows."""
    client, method = begin_client(recipe, number, stored)
    rows, _ = client.split_rows()
    chosen = rows[:10].tolist()
    client.model.zero_grad()
    with mask_trained_classes(client):
        run_step(client, client.examples, chosen, 0.0, micro, metered=False)
    return client, method, copy_gradients(client), chosen


def copy_gradients(client: ClientRound) -> dict[str, Tensor]:
    return {name: one.grad.clone() for name, one in client.model.named_parameters() if one.grad is not None}


def compute_gradients(client: Any, loss: Tensor) -> dict[str, Tensor]:
    client.model.zero_grad()
    loss.backward()
    return copy_gradients(client)


def forward(client: Any, batch: dict[str, Tensor], classes: list[int]) -> Tensor:
    """The logits by the plain layers, without the rest of fedtune."""
    logits = client.model(pixel_values=batch["pixel_values"]).logits
    hidden = torch.ones(10, dtype=torch.bool)
    hidden[classes] = False
    masked: Tensor = logits.masked_fill(hidden, -torch.inf)
    return masked


@pytest.mark.parametrize("micro", [None, 4])
def test_replay_adds_the_mean_loss_of_a_draw(tmp_path: Path, micro: int | None) -> None:
    recipe = make_recipe({"replay": {"share": 0.3, "weight": 0.5}})
    train_client(recipe, tmp_path, 1, 2)
    client, method, found, chosen = take_step(recipe, 3, read_files(tmp_path), micro)
    drawn = method.draw("examples", method.examples)
    assert len(set(drawn)) == 10
    new, old = client.examples.make_batch(chosen), method.examples.make_batch(drawn)
    classes = [0, 1, 2, 3]
    loss = sum(
        weight * F.cross_entropy(forward(client, batch, classes), batch["labels"])
        for weight, batch in ((1.0, new), (0.5, old))
    )
    expected = compute_gradients(client, loss)  # type: ignore[arg-type]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_draws_differ_between_steps_and_rounds_but_not_when_a_step_begins_again(tmp_path: Path) -> None:
    recipe = make_recipe({"replay": {"share": 0.5}})
    train_client(recipe, tmp_path, 1, 2)
    _, method, _, _ = take_step(recipe, 3, read_files(tmp_path))
    first = method.draw("examples", method.examples)
    assert first == method.draw("examples", method.examples)
    method.change_gradients()
    assert first != method.draw("examples", method.examples)
    _, later, _, _ = take_step(recipe, 4, {0: read_files(tmp_path)[0]})
    assert first != later.draw("examples", later.examples)


def test_der_stores_the_logits_of_training_time(tmp_path: Path) -> None:
    """Those of the step in which an example was trained, not those of the model after the round."""
    recipe = make_recipe({"der": {"share": 0.5}})
    seen: dict[bytes, Tensor] = {}
    client, method, _, chosen = take_step(recipe, 1, {})
    batch = client.examples.make_batch(chosen)
    with torch.no_grad():
        logits = forward(client, batch, [0, 1])
        seen = dict(zip(pack_examples(client.examples, chosen), logits, strict=True))
        for one in client.model.parameters():
            one.add_(1.0)  # what follows in the round
    store = read_store(method.list_stored_tensors())
    assert store.outputs is not None
    assert 0 < len(store.contents) <= 10
    for content, output in zip(store.contents, store.outputs, strict=True):
        torch.testing.assert_close(output, seen[content])
    assert torch.equal(store.outputs.isfinite(), torch.arange(10).expand_as(store.outputs) < 2)


def test_der_adds_both_terms_of_independent_draws(tmp_path: Path) -> None:
    recipe = make_recipe({"der": {"share": 0.3, "alpha": 0.7, "beta": 0.4}})
    train_client(recipe, tmp_path, 1, 2)
    for micro in (None, 3):
        client, method, found, chosen = take_step(recipe, 3, read_files(tmp_path), micro)
        one, other = method.draw("logits", method.stored), method.draw("labels", method.examples)
        assert one != other
        new, remembered = client.examples.make_batch(chosen), method.stored.make_batch(one)
        old = method.examples.make_batch(other)
        stored = method.memory.store.outputs[torch.tensor(one)][:, :2]  # the classes known in the first task
        classes = [0, 1, 2, 3]
        loss = (
            F.cross_entropy(forward(client, new, classes), new["labels"])
            + 0.7 * F.mse_loss(forward(client, remembered, classes)[:, :2], stored)
            + 0.4 * F.cross_entropy(forward(client, old, classes), old["labels"])
        )
        expected = compute_gradients(client, loss)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_der_keeps_the_logits_of_earlier_tasks_as_they_were(tmp_path: Path) -> None:
    recipe = make_recipe({"der": {"share": 0.5}})
    train_client(recipe, tmp_path, 1, 2, 3, 4)
    before, after = (select(read_files(tmp_path)[visit], "der") for visit in (0, 1))
    assert before.outputs is not None
    assert after.outputs is not None
    known = dict(zip(before.contents, before.outputs, strict=True))
    pairs = [(known[one], output) for one, output in zip(after.contents, after.outputs, strict=True) if one in known]
    assert pairs
    assert all(torch.equal(one, other) for one, other in pairs)
    assert len(pairs) < len(after.contents)


def make_parameters(*gradients: list[float]) -> dict[str, nn.Parameter]:
    made = {str(number): nn.Parameter(torch.zeros(len(one))) for number, one in enumerate(gradients)}
    for parameter, gradient in zip(made.values(), gradients, strict=True):
        parameter.grad = torch.tensor(gradient)
    return made


def flatten(tensors: list[Tensor | None]) -> Tensor:
    return torch.cat([one for one in tensors if one is not None])


def test_a_gem_takes_away_what_points_against_the_reference() -> None:
    for seed in range(50):
        random = torch.Generator().manual_seed(seed)
        own, reference = torch.randn(2, 7, generator=random)
        trained = make_parameters(own[:3].tolist(), own[3:].tolist())
        project_gradients(trained, {"0": reference[:3], "1": reference[3:]})
        found = flatten([one.grad for one in trained.values()])
        if own @ reference >= 0:
            assert torch.equal(found, own)
        else:
            expected = own - (own @ reference) / (reference @ reference) * reference
            torch.testing.assert_close(found, expected)
            assert float(found.double() @ reference.double()) >= -1e-6


def test_a_gem_leaves_a_reference_of_zeros_and_moves_tensors_without_a_gradient() -> None:
    trained = make_parameters([1.0, 2.0])
    project_gradients(trained, {"0": torch.zeros(2)})
    assert trained["0"].grad.tolist() == [1.0, 2.0]  # type: ignore[union-attr]
    trained = make_parameters([1.0], [5.0])
    trained["1"].grad = None
    project_gradients(trained, {"0": torch.tensor([-1.0]), "1": torch.tensor([1.0])})
    assert flatten([one.grad for one in trained.values()]).tolist() == [0.5, 0.5]


def test_a_gem_uses_the_gradient_of_stored_examples(tmp_path: Path) -> None:
    """The gradients after the hook are those of a projection by hand, and no step raises the stored examples' loss."""
    recipe = make_recipe({"a-gem": {"share": 0.3}})
    train_client(recipe, tmp_path, 1, 2)
    client, method, own, _ = take_step(recipe, 3, read_files(tmp_path))
    old = method.examples.make_batch(method.draw("examples", method.examples))
    with mask_trained_classes(client):
        method.change_gradients()
    found = copy_gradients(client)
    reference = compute_gradients(client, F.cross_entropy(forward(client, old, [0, 1, 2, 3]), old["labels"]))
    names = list(own)
    g, r, f = (flatten([tensors[name].flatten() for name in names]).double() for tensors in (own, reference, found))
    assert g @ r < 0  # the new classes push the old ones down
    torch.testing.assert_close(f, g - (g @ r) / (r @ r) * r, rtol=1e-4, atol=1e-6)
    assert float(f @ r) >= -1e-6 * float(f.norm() * r.norm())


def test_in_a_stream_of_new_classes_draws_include_the_task_and_all_classes_compete(tmp_path: Path) -> None:
    recipe = make_recipe({"replay": {"share": 0.3}}, loss="new")
    train_client(recipe, tmp_path, 1, 2)
    client, method, found, chosen = take_step(recipe, 3, read_files(tmp_path))
    labels = method.examples.make_batch(range(len(method.examples)))["labels"]
    assert set(labels.tolist()) == {0, 1, 2, 3}
    assert set(method.stored.make_batch(range(len(method.stored)))["labels"].tolist()) == {0, 1}
    new, old = client.examples.make_batch(chosen), method.examples.make_batch(method.draw("examples", method.examples))
    loss = F.cross_entropy(forward(client, new, [2, 3]), new["labels"]) + F.cross_entropy(
        forward(client, old, [0, 1, 2, 3]), old["labels"]
    )
    expected = compute_gradients(client, loss)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_where_the_task_is_known_each_example_competes_within_its_own(tmp_path: Path) -> None:
    recipe = make_recipe({"replay": {"share": 0.3}}, setting="task")
    train_client(recipe, tmp_path, 1, 2, 3, 4)
    client, method, found, chosen = take_step(recipe, 5, {1: read_files(tmp_path)[1]})
    old = method.examples.make_batch(method.draw("examples", method.examples))
    new = client.examples.make_batch(chosen)
    single = [
        F.cross_entropy(
            forward(client, {"pixel_values": old["pixel_values"][row : row + 1]}, [label // 2 * 2, label // 2 * 2 + 1]),
            old["labels"][row : row + 1],
        )
        for row, label in enumerate(old["labels"].tolist())
    ]
    loss = F.cross_entropy(forward(client, new, [4, 5]), new["labels"]) + torch.stack(single).mean()
    expected = compute_gradients(client, loss)
    assert len({label // 2 for label in old["labels"].tolist()}) == 2
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_a_buffer_too_small_for_a_class_is_told(tmp_path: Path) -> None:
    recipe = make_recipe({"replay": {"bytes": 500}})
    train_client(recipe, tmp_path, 1, 2)
    sentence = "replay has 500 bytes for examples of 4 classes, which leaves no room for one of class"
    with pytest.raises(MemoryBudgetError, match=sentence) as error:
        train_client(recipe, tmp_path, 3)
    assert error.value.code == "replay-short"


def test_a_share_that_the_budget_cuts_below_one_per_class_is_told(tmp_path: Path) -> None:
    recipe = make_recipe({"replay": {"share": 0.5}}, own_memory={"budget": "5KB"})
    with pytest.raises(MemoryBudgetError, match="leaves no room for one of class"):
        train_client(recipe, tmp_path, 1, 2, 3, 4, 5)


def test_the_choice_needs_classes_where_it_goes_by_class() -> None:
    client, _ = begin_client(make_recipe("replay"), 1)
    pictures = client.examples
    many = replace(pictures, labels=torch.zeros(len(pictures), 3))  # type: ignore[type-var]
    assert client.stream is not None
    rows, _ = client.split_rows()
    setup = MethodSetup(
        client.model, client.task, client.recipe, client.stream.place, 0, many, rows, client.derive_seed
    )
    method = build_unit("fedtune.continual", Unit(name="replay"), "here")
    with pytest.raises(DataError, match="have no class, by which they are to be kept"):
        open_memory(method, setup)


@pytest.mark.parametrize(
    ("memory", "own_memory", "sentence"),
    [
        ({"replay": {"share": 0.1, "bytes": 100}}, {}, "share and bytes are both given; drop one"),
        ({"replay": {"share": "120%"}}, {}, "less than or equal to 1"),
        ({"replay": {"share": "much"}}, {}, "share"),
        ({"replay": {"bytes": "5KB"}}, {"budget": "10KB"}, "stores 5000 in each of two files, which take 14096; raise"),
        ({"der": {"alpha": -1}}, {}, "alpha"),
        ({"a-gem": {"keep": "all"}}, {}, "keep"),
    ],
)
def test_settings_that_cannot_be_are_refused(memory: Any, own_memory: Any, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        make_recipe(memory, own_memory=own_memory)


def test_two_methods_share_the_budget_and_a_class_of_devices_has_its_own() -> None:
    both = [{"replay": {"bytes": "3KB"}}, {"der": {"bytes": "3KB"}}]
    with pytest.raises(RecipeError, match=r"replay\+der stores 6000"):
        make_recipe(*both, own_memory={"budget": "12KB"})
    stream = {"setting": "class", "tasks": {"size": 2, "rounds": 1}, "memory": both, "own_memory": {"budget": "1MB"}}
    devices = [{"name": "toy", "count": 3}, {"name": "watch", "count": 1, "storage": "12KB"}]
    with pytest.raises(RecipeError, match="devices: the storage of watch is 12000 bytes, but replay"):
        resolve_stream(stream, devices=devices)
    devices[1]["storage"] = "17KB"
    assert resolve_stream(stream, devices=devices).devices[1].storage == 17_000
