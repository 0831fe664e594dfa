"""Consolidation at a border: closed forms of aim, shrink and fisher, sums that add up, and rows of new classes."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fedtune.continual import StreamPlan
from fedtune.continual._border_sums import add_sums, average_sums, declare_sums, pack_sums
from fedtune.continual._consolidation import BorderEvidence, build_consolidation, consolidate_task
from fedtune.continual._head_rows import copy_rows, find_head_tensors, list_new_classes
from fedtune.errors import RecipeError
from fedtune.merging import ActivationStatistics, find_input_channels, sum_activations
from fedtune.recipe.schema import Unit
from tests.streams import make_plan, make_stream_recipe

LABELS = [str(number) for number in range(10)]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


BEFORE = {"w": drawn(1, 6, 4), "b": drawn(2, 6), "s": drawn(3)}
AFTER = {name: tensor + 0.1 * drawn(9 + place, *tensor.shape) for place, (name, tensor) in enumerate(BEFORE.items())}
LEVEL = torch.tensor([0.5, 2.0, 0.0, 1.0])


def aim(omega: float, level: Tensor = LEVEL) -> dict[str, Tensor]:
    pipeline = build_consolidation([Unit(name="aim", settings={"omega": omega})])
    return consolidate_task(pipeline, BEFORE, AFTER, BorderEvidence({"w": ActivationStatistics(level)}))


def test_aim_that_keeps_everything_is_the_plain_state_bit_for_bit() -> None:
    assert all(torch.equal(tensor, AFTER[name]) for name, tensor in aim(1.0).items())


def test_aim_puts_the_most_active_column_back_and_leaves_a_dead_one() -> None:
    found = aim(0.0)["w"]
    assert torch.equal(found[:, 1], BEFORE["w"][:, 1])
    assert torch.equal(found[:, 2], AFTER["w"][:, 2])


@pytest.mark.parametrize("omega", [0.0, 0.3, 0.7])
def test_aim_scales_each_columns_change_by_its_activity(omega: float) -> None:
    found = aim(omega)
    kept = 1 - (1 - omega) * LEVEL / LEVEL.max()
    torch.testing.assert_close(found["w"], BEFORE["w"] + (AFTER["w"] - BEFORE["w"]) * kept)
    assert torch.equal(found["b"], AFTER["b"])  # no input channels


def test_aim_without_measured_inputs_changes_nothing() -> None:
    pipeline = build_consolidation([Unit(name="aim")])
    found = consolidate_task(pipeline, BEFORE, AFTER, BorderEvidence())
    assert all(torch.equal(tensor, AFTER[name]) for name, tensor in found.items())


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_shrink_interpolates_the_two_ends(factor: float) -> None:
    pipeline = build_consolidation([Unit(name="shrink", settings={"factor": factor})])
    found = consolidate_task(pipeline, BEFORE, AFTER, BorderEvidence())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, BEFORE[name].lerp(AFTER[name], factor))
    if factor == 0:
        assert all(torch.equal(tensor, BEFORE[name]) for name, tensor in found.items())


def test_fisher_ends_at_the_minimum_of_both_quadratics() -> None:
    """The gradient of F_old/2 (x - theta*)^2 + F_t/2 (x - theta_t)^2 is zero there."""
    earlier, newest = ({name: drawn(seed, *one.shape).square() for name, one in BEFORE.items()} for seed in (30, 31))
    found = consolidate_task(
        build_consolidation([Unit(name="fisher")]), BEFORE, AFTER, BorderEvidence({}, earlier, newest)
    )
    for name, x in found.items():
        gradient = earlier[name] * (x - BEFORE[name]) + newest[name] * (x - AFTER[name])
        torch.testing.assert_close(gradient, torch.zeros_like(x), rtol=0, atol=1e-6)


def test_fisher_leaves_a_tensor_whose_information_only_one_end_has() -> None:
    information = {"w": torch.ones(6, 4)}
    evidence = BorderEvidence({}, information, {**information, "b": torch.ones(6)})
    found = consolidate_task(build_consolidation([Unit(name="fisher")]), BEFORE, AFTER, evidence)
    assert torch.equal(found["b"], AFTER["b"])
    torch.testing.assert_close(found["w"], (BEFORE["w"] + AFTER["w"]) / 2)


def test_two_relaxing_steps_multiply() -> None:
    units = [Unit(name="aim", settings={"omega": 0.0}), Unit(name="shrink", settings={"factor": 0.5})]
    found = consolidate_task(
        build_consolidation(units), BEFORE, AFTER, BorderEvidence({"w": ActivationStatistics(LEVEL)})
    )
    kept = (1 - LEVEL / LEVEL.max()) / 2
    torch.testing.assert_close(found["w"], BEFORE["w"] + (AFTER["w"] - BEFORE["w"]) * kept)


@pytest.mark.parametrize(
    ("units", "sentence"),
    [
        ([Unit(name="ties")], "ties: a border takes fisher once, aim, shrink, average or experts; other steps merge"),
        ([Unit(name="repair")], "repair: a border takes fisher once"),
        ([Unit(name="fisher"), Unit(name="aim")], "fisher and aim both weight what the new task changes; choose one"),
        (
            [Unit(name="aim", settings={"measured_by": "server"})],
            "the server has no inputs of earlier tasks; drop measured_by of aim",
        ),
        ([Unit(name="aimm")], "there is no 'aimm'"),
    ],
)
def test_steps_that_do_not_fit_a_border_are_refused(units: Sequence[Unit], sentence: str) -> None:
    with pytest.raises(RecipeError, match=f"^stream.consolidate: {sentence}"):
        build_consolidation(units)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


class Named(nn.Module):
    """A net that takes its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found


def test_sums_of_clients_and_tasks_are_those_of_all_examples() -> None:
    model, x = Named(), drawn(5, 60, 5)
    places = find_input_channels(model)

    def measure(rows: Tensor) -> dict[str, Tensor]:
        return pack_sums(sum_activations(model, places, [{"x": rows}]))

    clients = (x[:7], x[7:20]), (x[20:50], x[50:])
    tasks = [add_sums(measure(part) for part in parts) for parts in clients]
    found = average_sums(model, add_sums(tasks), list(places))
    assert found.keys() == places.keys()
    inputs = {"net.0.weight": x, "net.2.weight": model.net[:2](x)}  # type: ignore[index]
    for name, statistics in found.items():
        torch.testing.assert_close(statistics.mean_abs.float(), inputs[name].abs().mean(0).detach())
    assert {name: form.shape for name, form in declare_sums(places).items()} == {
        name: tuple(tensor.shape) for name, tensor in measure(x).items()
    }


def test_new_classes_are_those_of_no_task_before() -> None:
    recipe = make_stream_recipe(
        {
            "setting": "class",
            "tasks": [
                {"name": "low", "where": ["0", "1"], "rounds": 1},
                {"name": "high", "where": ["7", "9"], "rounds": 1},
                {"name": "low", "rounds": 1},
            ],
        }
    )
    plan = StreamPlan(recipe)
    assert [list_new_classes(plan, LABELS, visit) for visit in range(3)] == [[0, 1], [7, 9], []]
    assert list_new_classes(make_plan(), LABELS, 1) == []  # all tasks of a domain stream have the same classes


def test_rows_of_the_head_are_found_by_the_layer_and_copied() -> None:
    model = make_net()
    names = find_head_tensors(model, 3, ["0.weight", "2.weight", "2.bias"])
    assert names == ["2.weight", "2.bias"]
    state, source = model.state_dict(), {name: tensor + 1 for name, tensor in model.state_dict().items()}
    found = copy_rows(state, source, names, [1])
    assert torch.equal(found["2.weight"][1], source["2.weight"][1])
    assert torch.equal(found["2.weight"][[0, 2]], state["2.weight"][[0, 2]])
    assert found["0.weight"] is state["0.weight"]
