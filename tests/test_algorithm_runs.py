"""Algorithms in whole runs: against twins, killed and resumed, with updates that get lost, and refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from fedtune import checkpoint, paths
from fedtune.algorithms import Weighing, find_algorithm
from fedtune.algorithms.fednova import Fednova
from fedtune.algorithms.q_fedavg import compute_fair_coefficients
from fedtune.device.algorithm_memory import read_algorithm_inputs
from fedtune.device.own_memory import ALGORITHM_PREFIX, MemoryFolder
from fedtune.errors import ModelError, RecipeError, StoreError
from fedtune.library.plug_in_check import check_plug_in
from fedtune.recipe.schema import Recipe
from fedtune.recipe.unit_registry import list_unit_names
from fedtune.server.run_state import select_run_state
from fedtune.training import clear_run_context, get_run_context
from fedtune.wire.client_update import ClientUpdate, TrainRequest
from tests.algorithm_twins import Array, Clients, run_twin
from tests.breaks import kill_and_resume
from tests.federations import Ended, execute, spoilt, trivial, words

SETTINGS: dict[str, dict[str, Any]] = {
    "apfl": {"adaptive": True},
    "ditto": {"lam": 0.3},
    "fedlc": {"tau": 0.5},
    "feddyn": {"alpha": 0.5},
    "fednova": {},
    "fedper": {"keep": "head"},
    "fedrep": {"keep": "head", "head_share": 0.4},
    "fedprox": {"mu": 0.1},
    "moon": {"mu": 0.5},
    "private-adapter": {},
    "q-fedavg": {"q": 0.5},
    "scaffold": {"option": 2},
}
"""The settings that drive every algorithm of the package."""
ON_TEXTS = ("fedper", "fedrep", "private-adapter")
"""Those that need more than one layer, or adapters."""
LAST_STEPS = {
    "scaffold": "fedavgm",
    "fedper": "fedadam",
    "ditto": "fedavgm",
    "fedlc": "fedadam",
    "fedprox": "fedyogi",
    "moon": "fedadagrad",
}
"""Server optimisers that are killed and resumed together with an algorithm."""
NAMES = list_unit_names("fedtune.algorithms")
SGD = ("train.max_grad_norm=null", "train.lr=0.05")
FEW = ("data.max_train_examples=80",)


def with_algorithm(name: str, *overrides: str, **settings: Any) -> Recipe:
    chosen = json.dumps({name: settings or SETTINGS.get(name, {})})
    return trivial(f"federation.algorithm={chosen}", *SGD, *overrides)


def test_every_algorithm_is_driven_and_no_entry_is_stale() -> None:
    assert set(SETTINGS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_ends_with_the_bits_of_one_left_alone(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Each algorithm, with one of the server optimisers where it takes any, breaks off in its second round."""
    merge = f"merge=[mean, {LAST_STEPS[name]}]" if name in LAST_STEPS else "merge=[mean]"
    recipe = on_texts(tmp_path, name, merge) if name in ON_TEXTS else with_algorithm(name, *FEW, merge)
    alone = execute(recipe, run="alone")
    killed = kill_and_resume(recipe, monkeypatch)
    assert alone.run.status == killed.run.status == "completed"
    assert killed.hashes == alone.hashes
    assert read_memories(killed) == read_memories(alone)
    assert hash_own_files("killed") == hash_own_files("alone")
    keeps = name in LAST_STEPS or name in ("scaffold", "feddyn")
    assert len({*read_memories(alone)} - {None}) == (2 if keeps else 0), "what the server keeps changes in each round"


def on_texts(folder: Path, name: str, *overrides: str, **settings: Any) -> Recipe:
    chosen = json.dumps({name: settings or SETTINGS[name]})
    more = ("evaluation.local_holdout=0.25", "train.lr=0.05")
    return words(folder, f"federation.algorithm={chosen}", *more, *overrides)


def hash_own_files(run: str) -> dict[str, str]:
    """The digest of what each client keeps, by file."""
    folder = paths.get_runs_folder() / run / "own"
    return {
        str(path.relative_to(folder)): checkpoint.hash_tensors(load_file(path))
        for path in sorted(folder.rglob("*.safetensors"))
    }


def read_memories(ended: Ended) -> list[str | None]:
    return [record.checkpoint.memory_sha256 for record in ended.rounds if record.checkpoint]


def make_clients(recipe: Recipe, rounds: int) -> Clients:
    """The clients of a run as the twins see them: gradients of full batches, in double precision."""
    context = get_run_context(recipe.model_dump_json())
    model = context.model.double()
    names = [name for name, _ in model.named_parameters()]
    batches = [context.train.make_batch(rows.tolist()) for rows in context.client_rows]

    def compute_loss(w: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        values = dict(zip(names, split(w, model), strict=True))
        pixels = batch["pixel_values"].double()
        logits = functional_call(model, values, kwargs={"pixel_values": pixels}).logits
        return nn.functional.cross_entropy(logits, batch["labels"])

    def make_gradient(batch: Mapping[str, Tensor]) -> Any:
        def gradient(w: Array) -> Array:
            point = torch.from_numpy(w).requires_grad_()
            compute_loss(point, batch).backward()
            assert point.grad is not None
            return point.grad.numpy().copy()

        return gradient

    start = torch.cat([one.detach().flatten() for _, one in model.named_parameters()]).numpy().copy()
    clear_run_context()
    return Clients(
        [lambda w, batch=batch: float(compute_loss(torch.from_numpy(w), batch)) for batch in batches],  # type: ignore[misc]
        [make_gradient(batch) for batch in batches],
        [len(batch["labels"]) for batch in batches],
        [3] * len(batches),
        [list(range(len(batches)))] * rounds,
        start,
        recipe.train.lr,
    )


def split(w: Tensor, model: nn.Module) -> list[Tensor]:
    shapes = [one.shape for one in model.parameters()]
    parts = w.split([shape.numel() for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def read_last_state(ended: Ended, number: int) -> Array:
    path = paths.get_runs_folder() / ended.run.id / f"round-{number:04d}.safetensors"
    order = [name for name, _ in get_run_context(ended.run.recipe).model.named_parameters()]
    state = load_file(path)
    clear_run_context()
    return np.concatenate([state[name].double().numpy().ravel() for name in order])


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "q-fedavg"])
def test_a_whole_run_in_single_precision_follows_the_twin(home: Path, name: str) -> None:
    rounds, settings = 3, SETTINGS[name]
    more = [
        "data.partition={kind: dirichlet, alpha: 0.3}",
        "data.max_train_examples=80",
        f"federation.rounds={rounds}",
    ]
    recipe = with_algorithm(
        name, "train.batch_size=500", "train.local_steps=3", "train.lr_schedule=constant", *more, **settings
    )
    clients = make_clients(recipe, rounds)
    ended = execute(recipe)
    expected, fedavg = run_twin(name, clients, settings), run_twin("fedavg", clients, {})
    found = read_last_state(ended, rounds)
    assert np.abs(fedavg - expected).max() > 1e-4
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def read_device_tensors(run: str, client: int, number: int) -> dict[str, Tensor]:
    folder = paths.get_runs_folder() / run / "own" / f"client-{client:06d}"
    found = MemoryFolder(folder, run, prefix=ALGORITHM_PREFIX).read_earlier(number + 1)
    return next(iter(found.values()))


def read_server_tensors(run: str, number: int) -> dict[str, Tensor]:
    path = paths.get_runs_folder() / run / f"round-{number:04d}.safetensors"
    return select_run_state(checkpoint.read_checkpoint(checkpoint.get_memory_path(path)), "algorithm")


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_server_and_devices_count_the_same_updates_when_some_are_lost(home: Path, name: str) -> None:
    """The server's tensor stays the mean of those that devices go on from, although replies get lost."""

    def lose(message: Message, _: Message) -> Message:
        return Message(Error(0, "lost"), reply_to=message)

    recipe = with_algorithm(name, *FEW, "federation.rounds=4")
    ended = execute(recipe, spoilt(lose, [1, 2], rounds=[2, 4]))
    assert [record.status for record in ended.rounds[2].client_records] == ["merged", "error", "error", "merged"]
    first, later = (ended.rounds[number].client_records[0] for number in (1, 3))
    assert later.bytes_down / first.bytes_down == pytest.approx(2.0 if name == "scaffold" else 1.0, abs=0.05)
    assert first.bytes_up / first.bytes_down == pytest.approx(2.0 if name == "scaffold" else 1.0, abs=0.05)
    server = read_server_tensors("run-1", 4)
    own = [read_device_tensors("run-1", client, 3 if client in (1, 2) else 4) for client in range(4)]
    assert server
    for key, value in server.items():
        mean = torch.stack([one[key] for one in own]).double().mean(0)
        assert float(value.abs().max()) > 1e-4
        torch.testing.assert_close(value.double(), mean, rtol=1e-4, atol=1e-7)


def test_a_device_that_lost_its_tensors_is_refused(home: Path) -> None:
    recipe = with_algorithm("scaffold")
    request = TrainRequest(recipe.model_dump_json(), 3, 0, "run", merged_round=2)
    with pytest.raises(StoreError, match="lost what scaffold kept in round 2"):
        read_algorithm_inputs(recipe, request, {}, home / "own" / "client-000000")


def test_fednova_counts_for_clients_that_take_more_steps(home: Path) -> None:
    """With all data in batches of ten, the largest client takes most steps, and moves the mean less than in FedAvg."""
    unequal = ("train.local_steps=null", "train.local_epochs=1", "data.partition={kind: power-law}")
    more = (*FEW, *unequal, "federation.rounds=1")
    recipes = {"nova": with_algorithm("fednova", *more), "mean": trivial(*SGD, *more)}
    nova, mean = (read_last_state(execute(recipe, run=run), 1) for run, recipe in recipes.items())
    assert 1e-4 < np.abs(nova - mean).max() < 0.1


def test_moon_and_fedlc_train_an_encoder(home: Path, tmp_path: Path) -> None:
    plain = ("train.techniques=full", "train.optimiser=sgd", "train.lr=0.1")
    found = {
        name: execute(words(tmp_path, *plain, f"federation.algorithm={name}"), run=name).hashes
        for name in ("moon", "fedlc")
    }
    assert found["moon"][1] != found["fedlc"][1]
    assert found["moon"][2] != found["fedlc"][2]


LORA = 'train.techniques=[{lora: {trained_factors: "both"}}]'
DEVICES = "devices=[{name: a, count: 2}, {name: b, count: 2, techniques: [head-only]}]"


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("scafold", (), "there is no 'scafold'; did you mean 'scaffold'"),
        ("scaffold", (DEVICES,), "b has techniques of its own"),
        ("scaffold", ("privacy={clipping_norm: 1, noise_multiplier: 1}",), "more of clients than the deltas"),
        ("scaffold", ("federation.asynchronous={buffer_size: 2}",), "updates that all began with one state"),
        ("scaffold", ("train.optimiser=adamw",), "train.optimiser is adamw; set train.optimiser: sgd"),
        ("fedprox", ("train.optimiser=lomo", "train.max_grad_norm=null"), "which lomo applies before"),
        ("scaffold", ("train.techniques=compact",), "compact, which trains another random subspace"),
        ("scaffold", (LORA, "merge=[flexlora]"), "flexlora makes other factors each round"),
        ("feddyn", ("merge=[mean, fedadam]",), "fedadam would change it"),
        ("feddyn", ("merge=[trimmed-mean]",), "trimmed-mean gives another result; merge by mean"),
        ("q-fedavg", ("merge=[geometric-median]",), "geometric-median gives another result"),
        ("feddyn: {alpha: 0}", (), "alpha"),
        ("fedprox: {mu: .nan}", (), "mu"),
        ("q-fedavg: {q: -1}", (), "q"),
        ("scaffold: {option: 3}", (), "option"),
        ("moon: {temperature: 0}", (), "temperature"),
    ],
)
def test_what_an_algorithm_does_not_hold_with_is_refused(name: str, overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        trivial(f"federation.algorithm={{{name}}}" if ":" in name else f"federation.algorithm={name}", *overrides)


def test_tasks_without_classes_have_no_margins(tmp_path: Path) -> None:
    text = ("task=text-generation", f"data.source=csv:{tmp_path}/words.csv", "data.columns={text: text}")
    with pytest.raises(RecipeError, match="is for tasks whose examples have a class"):
        words(tmp_path, *text, "federation.algorithm=fedlc")


def test_a_model_without_a_last_linear_layer_is_refused() -> None:
    algorithm = find_algorithm(with_algorithm("moon"))
    assert algorithm is not None
    with pytest.raises(ModelError, match="does not end in one"):
        algorithm.check_model(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))


def test_a_recipe_without_an_algorithm_is_written_as_before() -> None:
    assert "algorithm" not in trivial().model_dump(mode="json")["federation"]
    written = with_algorithm("fedprox").model_dump(mode="json")["federation"]["algorithm"]
    assert written == {"fedprox": {"mu": 0.1}}


@pytest.mark.parametrize("name", ["apfl", "fedrep", "moon", "q-fedavg", "scaffold"])
def test_an_algorithm_passes_the_checks_of_a_plug_in(name: str) -> None:
    results = list(check_plug_in(name))
    assert {(one.status, one.what, one.reason) for one in results if one.status != "ok"} == set()
    assert len(results) == 7


def test_device_classes_with_batches_of_their_own_share_variates_and_steps(home: Path) -> None:
    mixed = "devices=[{name: a, count: 2}, {name: b, count: 2, batch_size: 5}]"
    for name in ("scaffold", "fednova"):
        ended = execute(with_algorithm(name, *FEW, mixed), run=name)
        assert {one.status for one in ended.rounds[2].client_records} == {"merged"}


def test_what_a_device_states_of_itself_cannot_overflow(tmp_path: Path) -> None:
    found = compute_fair_coefficients([1e30, 1.0, 0.0], [1.0, 1.0, 0.0], 100.0, 20.0)
    assert found[0] == pytest.approx(1.0)
    assert found[1:] == [0.0, 0.0]
    for client, length in enumerate([1e-38, 2.0]):
        save_file({"fednova/length": torch.tensor([length])}, tmp_path / str(client))
    updates = [ClientUpdate(client, 1, tmp_path / str(client)) for client in range(2)]
    weighing = Weighing(with_algorithm("fednova"), {}, updates, [0.5, 0.5])
    assert Fednova().compute_scales(weighing) == [1e4, pytest.approx(0.5)]
