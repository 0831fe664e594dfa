"""The analytic head with a tuned backbone: it is frozen for good, or sums are renewed by whoever still holds data."""

import itertools
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedtune.continual import Border, MethodSetup, Place, TaskUpload
from fedtune.continual._analytic_heads import UNSEEN_BIAS, fit_slda
from fedtune.continual._counted_sums import read_counted_sums
from fedtune.continual._head_features import hash_backbone, iter_features
from fedtune.continual.analytic import Analytic
from fedtune.errors import FedtuneWarning, ModelError
from fedtune.export import export_model
from fedtune.recipe.schema import Recipe
from fedtune.recipe.yaml_file import parse_recipe
from fedtune.simulation import resolve_recipe
from fedtune.training import RunContext, get_model_state, get_run_context, set_model_state
from tests.federations import TRIVIAL, WORDS, execute, tiny_bert
from tests.streams import resolve_stream
from tests.test_analytic import KEPT, analytic, equals_state, make_recipe, read_memory, read_state, sum_centrally
from tests.test_stream_deployment import write_rows

pytestmark = pytest.mark.usefixtures("home")

TASKS = [{"name": "low", "where": ["0", "1"], "rounds": 2}, {"name": "high", "where": ["2", "3"], "rounds": 2}]
FULL = {**yaml.safe_load(TRIVIAL)["train"], "techniques": ["full"]}


def tuned_recipe(tune: str, **changes: Any) -> Recipe:
    """A narrow ResNet that is tuned on two tasks of two digits."""
    stream = {"setting": "class", "tasks": TASKS, "memory": [analytic(tune=tune)]}
    settings = {"train": FULL, "model": {"source": "sample:resnet18-narrow"}, "checkpoints": KEPT}
    return resolve_stream(stream, **settings, **changes)


@pytest.mark.parametrize("tune", ["first", "every"])
def test_a_tuned_backbone_rests_while_sums_are_taken_and_the_head_fits_all_examples_so_far(tune: str) -> None:
    recipe = tuned_recipe(tune)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FedtuneWarning)
        ended = execute(recipe)
    context = get_run_context(recipe.model_dump_json())
    states = [read_state(ended, number) for number in range(5)]
    backbones = [hash_backbone(context.model, state).tolist() for state in states]
    moved = [one != other for one, other in zip(backbones[1:], backbones, strict=False)]
    assert moved == [True, False, tune == "every", False]
    for number, tasks in ((2, {0}), (4, {0, 1})):
        head = fit_slda(sum_centrally(context, states[number], tasks), 0.1)
        features = torch.cat([one for one, _ in iter_features(context.model, (), context.train, range(40), 40)])
        weight, bias = states[number]["fc.weight"].double(), states[number]["fc.bias"].double()
        exact, found = (features.double() @ w.T + b for w, b in ((head.weight, head.bias), (weight, bias)))
        seen = head.bias > UNSEEN_BIAS
        torch.testing.assert_close(found[:, seen], exact[:, seen], rtol=1e-3, atol=1e-3)
        assert bool((bias[~seen] == UNSEEN_BIAS).all())
    memory = read_counted_sums(read_memory(ended, 4))
    assert torch.equal(memory.backbone, hash_backbone(context.model, states[4]))
    assert memory.counted.all()


@pytest.mark.parametrize("merge", ["flora", "mean"])
def test_a_tuned_text_model_rests_whatever_the_merge_does_to_it(tmp_path: Path, merge: str) -> None:
    """FLoRA draws the pairs anew in each merge, also when no client moved anything."""
    tiny_bert(tmp_path / "bert")
    write_rows(tmp_path / "words.csv", "kitchen", "garden")
    stream = {
        "setting": "domain",
        "tasks": [{"name": "kitchen", "rounds": 2}, {"name": "garden", "rounds": 1}],
        "memory": [analytic(tune="first")],
    }
    factors = "both-and-base" if merge == "flora" else "alternate"
    overrides = [
        "data.columns.domain=place",
        f"merge=[{merge}]",
        f"train.techniques=[{{lora: {{rank: 1, trained_factors: {factors}}}}}]",
        f"stream={json.dumps(stream)}",
        "checkpoints.keep=all",
    ]
    text = WORDS.format(folder=tmp_path).replace("federation: {rounds: 2}", "federation: {}")
    recipe = resolve_recipe(parse_recipe(text, "words", overrides))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FedtuneWarning)
        ended = execute(recipe)
    states = [read_state(ended, number) for number in range(4)]
    moved = [
        {name for name, tensor in other.items() if not torch.equal(tensor, one[name])}
        for one, other in itertools.pairwise(states)
    ]
    assert len(moved[0]) > 2
    assert moved[1] == {"classifier.weight", "classifier.bias"}
    assert moved[2] <= moved[1]
    context = get_run_context(recipe.model_dump_json())
    assert read_counted_sums(read_memory(ended, 3)).total.counts.sum() == len(context.corpus.train)


def prepare() -> tuple[RunContext, Analytic, dict[str, torch.Tensor]]:
    context = get_run_context(tuned_recipe("every").model_dump_json())
    method = context.methods[0]
    assert isinstance(method, Analytic)
    return context, method, get_model_state(context.model, context.shared_names)


def make_upload(context: RunContext, method: Analytic, client: int, held: dict[int, np.ndarray]) -> TaskUpload:
    """What a client sends at the end of the newest task that it holds."""
    task, rows = max(held.items())
    place = Place(task, task, 2, 2, tuple(range(task + 1)))
    setup = MethodSetup(
        context.model, context.task, context.recipe, place, client, context.train, rows, lambda _: 0, num_tasks=2
    )
    return TaskUpload(client, 0.5, method.begin_round(replace(setup, held_rows=held)).compute_upload())


def make_border(context: RunContext, state: Mapping[str, torch.Tensor], task: int, **changes: Any) -> Border:
    border = Border(context.recipe, context.model, task, task, 2, state, state, state, {}, [])
    return replace(border, **changes)


def select_rows(context: RunContext, client: int, task: int) -> np.ndarray:
    rows = context.client_rows[client]
    found: np.ndarray = rows[context.task_numbers[rows] == task]
    return found


def test_what_no_device_can_renew_is_said_and_its_classes_keep_their_rows() -> None:
    context, method, state = prepare()
    held = {client: {0: select_rows(context, client, 0)} for client in range(2)}
    uploads = [make_upload(context, method, client, own) for client, own in held.items()]
    first = method.after_task(make_border(context, state, 0, uploads=uploads))
    moved = {**first.state, "layer4.1.conv2.weight": first.state["layer4.1.conv2.weight"] * 1.1}
    set_model_state(context.model, moved)
    later = [make_upload(context, method, client, {1: select_rows(context, client, 1)}) for client in range(2)]
    border = make_border(context, moved, 1, before=first.state, uploads=later, memory=first.memory)
    with pytest.warns(FedtuneWarning, match="could not be renewed: low of clients 0, 1"):
        lost = method.after_task(border)
    assert torch.equal(lost.state["fc.weight"][:2], first.state["fc.weight"][:2])
    assert torch.equal(lost.state["fc.bias"][:2], first.state["fc.bias"][:2])
    assert bool((lost.state["fc.bias"][2:4] > UNSEEN_BIAS).all())
    assert bool((lost.state["fc.bias"][4:] == UNSEEN_BIAS).all())
    both = {0: select_rows(context, 0, 0), 1: select_rows(context, 0, 1)}
    half = [make_upload(context, method, 0, both), later[1]]
    with pytest.warns(FedtuneWarning, match="could not be renewed: low of clients 1$"):
        renewed = method.after_task(replace(border, uploads=half))
    rows = np.concatenate([*both.values(), select_rows(context, 1, 1)])
    counts = torch.bincount(torch.tensor(context.corpus.train["label"])[rows], minlength=10)
    assert torch.equal(read_counted_sums(renewed.memory).total.counts, counts.double())
    assert read_counted_sums(renewed.memory).counted[:, :2].tolist() == [[1, 0], [1, 1]]


def test_an_upload_of_another_backbone_is_left_out_with_a_warning() -> None:
    context, _, state = prepare()
    method = Analytic(fewest=1, precision="float64")
    rows = {0: select_rows(context, 0, 0)}
    good, bad = (make_upload(context, method, client, rows) for client in range(2))
    bad.tensors["backbone"][0] ^= 1
    with pytest.warns(FedtuneWarning, match="client 1 summed the features of another backbone in round 2"):
        found = method.after_task(make_border(context, state, 0, uploads=[good, bad]))
    assert read_counted_sums(found.memory).counted.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    with pytest.warns(FedtuneWarning, match="client 1"), pytest.warns(FedtuneWarning, match="no sums arrived for task"):
        none = method.after_task(make_border(context, state, 0, uploads=[bad]))
    assert none.state is state
    assert not none.memory


def test_a_border_without_uploads_changes_nothing_and_says_so() -> None:
    context, method, state = prepare()
    with pytest.warns(FedtuneWarning, match="no sums arrived for task low"):
        found = method.after_task(make_border(context, state, 0))
    assert found.state is state


def test_a_border_that_is_repeated_changes_nothing() -> None:
    context, _, state = prepare()
    method = Analytic(fewest=1, precision="float64")
    upload = make_upload(context, method, 0, {0: select_rows(context, 0, 0)})
    once = method.after_task(make_border(context, state, 0, uploads=[upload]))
    again = method.after_task(make_border(context, once.state, 0, uploads=[upload], memory=once.memory))
    for one, other in ((once.state, again.state), (once.memory, again.memory)):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_projected_head_cannot_be_exported(tmp_path: Path) -> None:
    recipe = make_recipe(analytic(head="ranpac", width=20))
    with pytest.raises(ModelError, match="cannot contain the projection of ranpac"):
        export_model(recipe, {}, tmp_path / "model", None, "")


def test_the_head_is_the_unit_head_of_the_state() -> None:
    context, _, state = prepare()
    method = Analytic(fewest=1, precision="float64")
    held = [{0: select_rows(context, client, 0)} for client in range(4)]
    uploads = [make_upload(context, method, client, own) for client, own in enumerate(held)]
    found = method.after_task(make_border(context, state, 0, uploads=uploads))
    head = {name: tensor for name, tensor in found.state.items() if name.startswith("fc.")}
    assert equals_state(fit_slda(read_counted_sums(found.memory).total, 0.1), head)
