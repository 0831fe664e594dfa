"""The analytic head in whole runs: the central fit for any split and order, and a resume with the same bits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from pydantic import ValidationError
from torch import Tensor

from fedtune import checkpoint, paths
from fedtune.continual._analytic_heads import LinearHead, fit_ridge, fit_slda, score_features
from fedtune.continual._counted_sums import read_counted_sums
from fedtune.continual._feature_sums import FeatureSums, sum_features
from fedtune.continual._head_features import iter_features
from fedtune.continual._random_projection import make_projection
from fedtune.device.client_app import train_round
from fedtune.errors import FedtuneError
from fedtune.recipe.schema import Recipe
from fedtune.training import RunContext, clear_run_context, get_run_context, set_model_state
from tests.federations import TRIVIAL, Ended, execute
from tests.streams import CLASSES, check_killed_run, list_memory, resolve_stream
from tests.test_stream_runs import read_border

pytestmark = pytest.mark.usefixtures("home")

HEAD_ONLY = {**yaml.safe_load(TRIVIAL)["train"], "techniques": ["head-only"]}
KEPT = {"keep": "all"}
ORDERS = [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"]]


def analytic(**settings: Any) -> dict[str, Any]:
    return {"analytic": {"fewest": 1, "precision": "float64", **settings}}


def make_recipe(unit: Mapping[str, Any], stream: Mapping[str, Any] = CLASSES, **changes: Any) -> Recipe:
    settings = {"train": HEAD_ONLY, "checkpoints": KEPT, **changes}
    return resolve_stream({**stream, "memory": [unit]}, **settings)


def read_state(ended: Ended, number: int) -> dict[str, Tensor]:
    found = ended.rounds[number].checkpoint
    assert found is not None
    return checkpoint.read_checkpoint(paths.get_runs_folder() / found.path)


def read_memory(ended: Ended, number: int) -> dict[str, Tensor]:
    found = ended.rounds[number].checkpoint
    assert found is not None
    path = checkpoint.get_memory_path(paths.get_runs_folder() / found.path)
    tensors = checkpoint.read_checkpoint(path, found.memory_sha256)
    return {name.removeprefix("analytic/"): tensor for name, tensor in tensors.items()}


def sum_centrally(context: RunContext, state: Mapping[str, Tensor], tasks: set[int]) -> FeatureSums:
    """The sums over all training examples of some tasks, with the state in the model, in one pass."""
    set_model_state(context.model, state)
    rows = [row for row, task in enumerate(context.task_numbers.tolist()) if task in tasks]
    found = list(iter_features(context.model, context.techniques, context.train, rows, 50))
    return sum_features(found, 10, found[0][0].shape[1])


def equals_state(head: LinearHead, state: Mapping[str, Tensor]) -> bool:
    weight, bias = (next(tensor for name, tensor in state.items() if name.endswith(end)) for end in ("weight", "bias"))
    return torch.equal(head.weight.float(), weight) and torch.equal(head.bias.float(), bias)


@pytest.mark.parametrize("head", ["slda", "ridge"])
def test_the_head_of_a_run_is_the_one_of_a_single_pass_over_all_examples(head: str) -> None:
    recipe = make_recipe(
        analytic(head=head), data={"source": "sample:digits", "partition": {"kind": "dirichlet", "alpha": 0.3}}
    )
    ended = execute(recipe)
    context = get_run_context(recipe.model_dump_json())
    for number in (1, 3, 5):
        sums = sum_centrally(context, {}, set(range(number)))
        fitted = fit_slda(sums, 0.1) if head == "slda" else fit_ridge(sums, 0.1)
        assert equals_state(fitted, read_state(ended, number)), number
    last = read_border(ended, 5)
    assert last["mean"] > 0.9
    assert last["0+1"] > 0.9
    memory = read_counted_sums(read_memory(ended, 5))
    assert memory.counted.all()
    assert memory.total.counts.sum() == len(context.corpus.train)
    assert len({one.status for record in ended.rounds[1:] for one in record.client_records}) == 1


def test_order_of_tasks_split_and_number_of_devices_change_no_bit_of_the_last_head() -> None:
    found = []
    for run, (order, partition, clients) in enumerate(
        [
            (ORDERS, {"kind": "iid"}, 4),
            (ORDERS[::-1], {"kind": "dirichlet", "alpha": 0.2}, 4),
            ([ORDERS[3], *ORDERS[:3], ORDERS[4]], {"kind": "iid"}, 7),
        ]
    ):
        tasks = [{"name": "+".join(where), "where": where, "rounds": 1} for where in order]
        recipe = make_recipe(
            analytic(head="ridge"),
            {**CLASSES, "tasks": tasks},
            data={"source": "sample:digits", "partition": partition},
            devices=[{"name": "toy", "count": clients}],
        )
        found.append(read_state(execute(recipe, run=f"run-{run}"), 5))
        clear_run_context()
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


def test_sums_in_single_precision_give_nearly_the_same_head() -> None:
    recipes = [make_recipe(analytic(precision=precision)) for precision in ("float64", "float32")]
    ended = [execute(recipe, run=f"run-{number}") for number, recipe in enumerate(recipes)]
    memory = [read_counted_sums(read_memory(one, 5)).total for one in ended]
    pixels = torch.cat(_list_pixels(get_run_context(recipes[0].model_dump_json())))
    exact, single = (score_features(fit_slda(sums, 0.1), pixels.flatten(1)) for sums in memory)
    assert 0 < (exact - single).abs().max() / exact.abs().max() < 1e-5


def test_a_recurring_task_counts_once() -> None:
    tasks = [{"name": name, "where": list(name), "rounds": 1} for name in ("01", "234")]
    states = []
    for run, listed in (("once", tasks), ("twice", [*tasks, {"name": "01", "rounds": 1}])):
        ended = execute(make_recipe(analytic(), {"setting": "class", "tasks": listed}), run=run)
        states.append(read_state(ended, len(listed)))
        clear_run_context()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_devices_withhold_classes_with_few_examples() -> None:
    recipe = make_recipe(
        analytic(fewest=12),
        data={"source": "sample:digits", "partition": {"kind": "dirichlet", "alpha": 0.2}},
        checkpoints=KEPT,
    )
    sums = read_counted_sums(read_memory(execute(recipe), 5)).total
    context, wanted = get_run_context(recipe.model_dump_json()), torch.zeros(10, dtype=torch.float64)
    labels = torch.tensor(context.corpus.train["label"])
    for rows in context.client_rows:
        counts = torch.bincount(labels[rows], minlength=10)
        wanted += counts * (counts >= 12)
    assert torch.equal(sums.counts, wanted)
    assert 0 < wanted.sum() < len(labels)


def test_a_projected_head_is_the_ridge_on_projected_features() -> None:
    recipe = make_recipe(analytic(head="ranpac", width=200, ridge=0.01))
    ended = execute(recipe)
    context = get_run_context(recipe.model_dump_json())
    plain = torch.relu(
        torch.cat([one.flatten(1) for one in _list_pixels(context)]) @ make_projection(recipe.seed, 784, 200)
    )
    fitted = fit_ridge(sum_features([(plain, torch.tensor(context.corpus.train["label"]))], 10, 200), 0.01)
    weight = read_state(ended, 5)["classifier.linear.weight"]
    torch.testing.assert_close(weight.double(), fitted.weight, rtol=1e-3, atol=1e-4)
    assert read_border(ended, 5)["mean"] > 0.9


def _list_pixels(context: RunContext) -> list[Tensor]:
    return [context.train.make_batch([row])["pixel_values"].mean(1) for row in range(len(context.train))]


@pytest.mark.parametrize("plant", ["half a checkpoint", "after spooling", "before the commit"])
def test_a_run_killed_at_a_border_resumes_with_the_same_bits(tmp_path: Path, plant: str) -> None:
    stream = {**CLASSES, "memory": [{"analytic": {}}]}
    memory = list_memory(check_killed_run(tmp_path, plant, stream, train=HEAD_ONLY, checkpoints=KEPT))
    assert memory[0] is None
    assert len(set(memory)) == 6


def test_devices_that_build_everything_anew_send_what_a_simulation_has() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        clear_run_context()
        return train_round(message, context)

    recipe = make_recipe(analytic(), {**CLASSES, "tasks": {"size": 5, "rounds": 1}})
    simulated, deployed = execute(recipe), execute(recipe, app, run="deployed")
    assert simulated.hashes == deployed.hashes


REFUSED: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ({}, {"setting": "task"}, {}, "analytic: it computes one head for all classes"),
    ({}, {}, {"train": {**HEAD_ONLY, "techniques": ["full"]}}, "full trains below the head"),
    ({"tune": "first"}, {}, {}, "head-only tunes nothing below the head"),
    (
        {"tune": "first"},
        {},
        {"train": {**HEAD_ONLY, "techniques": ["full"]}},
        "each task has one round, in which the sums are taken",
    ),
    (
        {"tune": "every"},
        {"tasks": [{"name": "a", "where": ["0", "1"], "rounds": 2}, {"name": "b", "where": ["2"], "rounds": 1}]},
        {"train": {**HEAD_ONLY, "techniques": ["full"]}},
        "task b has one round",
    ),
    (
        {"tune": "first"},
        {},
        {
            "train": {**HEAD_ONLY, "techniques": ["full", {"batch-norm-statistics": {"local": True}}]},
            "evaluation": {"local_holdout": 0.2},
        },
        "batch-norm-statistics keeps tensors on each device",
    ),
    ({}, {"arrival": "own"}, {}, "needs all clients to end a task in the same round"),
    ({"ridge": 0}, {}, {}, "ridge is 0, but must be above 0"),
    ({"ridge": "thirds"}, {}, {}, "ridge"),
    ({"shrinkage": 1.5}, {}, {}, "shrinkage"),
    (
        {},
        {},
        {"privacy": {"clipping_norm": 1.0, "noise_multiplier": 1.0}},
        "sends statistics that privacy neither clips nor noises",
    ),
    ({"head": "ranpac", "width": 6000}, {}, {}, "6000 features would make each device send 72 MB"),
]


@pytest.mark.parametrize(("settings", "stream", "changes", "said"), REFUSED)
def test_what_the_analytic_head_cannot_do_is_refused_in_a_sentence(
    settings: dict[str, Any], stream: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises((FedtuneError, ValidationError), match=said):
        get_run_context(make_recipe(analytic(**settings), {**CLASSES, **stream}, **changes).model_dump_json())
