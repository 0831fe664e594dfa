"""AIM and its control on deltas: what is scaled by how much, and what stays as merged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedtune.errors import RecipeError
from fedtune.merging import (
    ActivationRelaxStep,
    ActivationStatistics,
    CalibrationRequest,
    MergeContext,
    build_calibration_request,
    build_pipeline,
    find_dominated_weights,
    merge_client_updates,
)
from fedtune.merging.combine.mean import Mean
from fedtune.merging.relax.aim import Aim, scale_adapter_columns
from fedtune.merging.relax.shrink import Shrink
from fedtune.recipe.schema import Unit
from fedtune.wire import client_update
from tests.test_merging import a_state, spool

SHAPES: dict[str, tuple[int, ...]] = {
    "linear.weight": (9, 6),
    "linear.bias": (9,),
    "conv1d.weight": (6, 9),
    "conv.weight": (5, 6, 3, 3),
    "grouped.weight": (8, 2, 3, 3),
    "norm.weight": (6,),
    "embed.weight": (11, 6),
    "scale": (),
}
OMEGAS = (0.0, 0.2, 0.4, 0.8, 1.0)


def figures(seed: int = 5) -> dict[str, ActivationStatistics]:
    random = torch.Generator().manual_seed(seed)

    def level(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, dtype=torch.float64) + 0.01

    return {
        "linear.weight": ActivationStatistics(level(6)),
        "conv1d.weight": ActivationStatistics(level(6), axis=0),
        "conv.weight": ActivationStatistics(level(6)),
        "grouped.weight": ActivationStatistics(level(8, 2)),
        "norm.weight": ActivationStatistics(level(6), axis=0),
    }


def relaxed(
    step: ActivationRelaxStep, deltas: Mapping[str, Tensor], found: Mapping[str, ActivationStatistics]
) -> dict[str, Tensor]:
    return {name: step.relax(name, 0, delta, MergeContext(found)) for name, delta in deltas.items()}


def twin(deltas: Mapping[str, Tensor], found: Mapping[str, ActivationStatistics], omega: float) -> dict[str, Tensor]:
    """Channel by channel, in loops."""
    scaled = {name: delta.double().clone() for name, delta in deltas.items()}
    for name, (level, axis) in found.items():
        for place in range(level.numel()):
            index = tuple(divmod(place, level.shape[1])) if level.dim() == 2 else (slice(None),) * axis + (place,)
            scaled[name][index] *= 1 - (1 - omega) * float(level.flatten()[place] / level.max())
    return scaled


@pytest.mark.parametrize("omega", OMEGAS)
def test_every_channel_is_scaled_by_one_minus_its_share(omega: float) -> None:
    deltas = a_state(SHAPES)
    wanted = twin(deltas, figures(), omega)
    for name, tensor in relaxed(Aim(omega=omega), deltas, figures()).items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=3e-7, atol=0)


@pytest.mark.parametrize("units", [["mean"], ["mean", "aim"]], ids=["plain", "omega-1"])
def test_omega_one_is_bit_equal_to_the_plain_merge(tmp_path: Path, units: list[str]) -> None:
    steps = [Unit(name=unit, settings={"omega": 1.0} if unit == "aim" else {}) for unit in units]
    sent = [spool(tmp_path, client, 3, a_state(SHAPES, client + 1)) for client in range(3)]
    merged = merge_client_updates(build_pipeline(steps), a_state(SHAPES), SHAPES, sent, MergeContext(figures()))
    plain = merge_client_updates(build_pipeline([Unit(name="mean")]), a_state(SHAPES), SHAPES, sent)
    assert all(torch.equal(merged[name], plain[name]) for name in SHAPES)


def test_omega_zero_leaves_the_most_active_channel_at_the_base(tmp_path: Path) -> None:
    sent = [spool(tmp_path, 0, 3, a_state(SHAPES, 1))]
    pipeline = build_pipeline([Unit(name="mean"), Unit(name="aim", settings={"omega": 0.0})])
    merged = merge_client_updates(pipeline, a_state(SHAPES), SHAPES, sent, MergeContext(figures()))
    for name, axis in (("linear.weight", 1), ("conv1d.weight", 0), ("conv.weight", 1), ("norm.weight", 0)):
        top = int(figures()[name].mean_abs.argmax())
        assert torch.equal(merged[name].select(axis, top), a_state(SHAPES)[name].select(axis, top))
        assert not torch.equal(merged[name], a_state(SHAPES)[name])


@pytest.mark.parametrize("omega", [0.2, 0.4, 0.7])
def test_the_most_active_column_keeps_exactly_omega_of_its_norm(omega: float) -> None:
    delta = a_state(SHAPES)["linear.weight"]
    top = int(figures()["linear.weight"].mean_abs.argmax())
    scaled = Aim(omega=omega).relax("linear.weight", 0, delta, MergeContext(figures()))
    assert float(scaled[:, top].norm() / delta[:, top].norm()) == pytest.approx(omega, rel=1e-6)


def test_the_update_is_linear_in_omega_and_grows_with_it() -> None:
    deltas = a_state(SHAPES)
    none, whole = (relaxed(Aim(omega=omega), deltas, figures()) for omega in (0.0, 1.0))
    for omega in (0.25, 0.5, 0.75):
        half = relaxed(Aim(omega=omega), deltas, figures())
        for name in figures():
            torch.testing.assert_close(half[name], omega * whole[name] + (1 - omega) * none[name])
            assert float(none[name].norm()) < float(half[name].norm()) < float(whole[name].norm())


def test_no_update_stays_none_and_what_has_no_channels_stays_as_merged() -> None:
    deltas = a_state(SHAPES)
    scaled = relaxed(Aim(), deltas, figures())
    assert all(torch.equal(scaled[name], deltas[name]) for name in SHAPES.keys() - figures().keys())
    nothing = relaxed(Aim(), {name: torch.zeros(shape) for name, shape in SHAPES.items()}, figures())
    assert not any(bool(tensor.any()) for tensor in nothing.values())


def test_scaling_all_activations_changes_nothing_at_all() -> None:
    louder = {name: found._replace(mean_abs=found.mean_abs * 1024) for name, found in figures().items()}
    before, after = (relaxed(Aim(), a_state(SHAPES), found) for found in (figures(), louder))
    assert all(torch.equal(before[name], after[name]) for name in SHAPES)


def test_norms_may_be_left_out() -> None:
    deltas = a_state(SHAPES)
    scaled = relaxed(Aim(include_norms=False), deltas, figures())
    assert torch.equal(scaled["norm.weight"], deltas["norm.weight"])
    assert not torch.equal(scaled["linear.weight"], deltas["linear.weight"])


@pytest.mark.parametrize("piece", [1, 7, 20])
@pytest.mark.parametrize("step", ["aim", "shrink"])
def test_the_bits_do_not_depend_on_the_piece(
    tmp_path: Path, piece: int, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = [spool(tmp_path, client, 3, a_state(SHAPES, client + 1)) for client in range(2)]
    pipeline = build_pipeline([Unit(name="mean"), Unit(name=step)])
    whole = merge_client_updates(pipeline, a_state(SHAPES), SHAPES, sent, MergeContext(figures()))
    monkeypatch.setattr(client_update, "_PIECE", piece)
    cut = merge_client_updates(pipeline, a_state(SHAPES), SHAPES, sent, MergeContext(figures()))
    assert all(torch.equal(whole[name], cut[name]) for name in SHAPES)


def test_an_adapter_relaxed_then_merged_is_the_merge_relaxed() -> None:
    random = torch.Generator().manual_seed(1)
    b, a = (torch.randn(*shape, generator=random) for shape in ((24, 4), (4, 16)))
    found = {"w": ActivationStatistics(torch.rand(16, generator=random))}
    dense = Aim(omega=0.3).relax("w", 0, b @ a, MergeContext(found))
    torch.testing.assert_close(b @ scale_adapter_columns(a, found["w"], 0.3), dense)
    assert float((b @ a - dense).norm() / dense.norm()) > 0.1


def test_in_a_round_that_trains_a_alone_scaling_its_delta_relaxes_the_product_exactly() -> None:
    random = torch.Generator().manual_seed(2)
    b, before, after = (torch.randn(*shape, generator=random) for shape in ((24, 4), (4, 16), (4, 16)))
    found = {"w": ActivationStatistics(torch.rand(16, generator=random))}
    relax = Aim(omega=0.3).relax
    factor = before + relax("w", 0, after - before, MergeContext(found))
    torch.testing.assert_close(b @ factor, b @ before + relax("w", 0, b @ (after - before), MergeContext(found)))


def test_one_outlier_leaves_all_other_channels_as_merged_and_is_told() -> None:
    found = figures()
    planted = found["linear.weight"].mean_abs.clone()
    planted[2] *= 1e4
    delta = a_state(SHAPES)["linear.weight"]
    scaled = Aim().relax("linear.weight", 0, delta, MergeContext({"linear.weight": ActivationStatistics(planted)}))
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(scaled[:, others], delta[:, others], rtol=0.02, atol=0)
    told = find_dominated_weights({**found, "linear.weight": ActivationStatistics(planted)})
    assert told.keys() == {"linear.weight"}
    assert told["linear.weight"] < 1e-3
    assert find_dominated_weights(found) == {}


def test_a_quantile_takes_the_bar_from_the_outlier_back_to_the_others() -> None:
    level = torch.tensor([1.0, 2.0, 3.0, 4.0, 1e6])
    scaled = Aim(omega=0.0, peak_quantile=0.75).relax(
        "w", 0, torch.ones(1, 5), MergeContext({"w": ActivationStatistics(level)})
    )
    torch.testing.assert_close(scaled, torch.tensor([[0.75, 0.5, 0.25, 0.0, 0.0]]))


def test_channels_that_are_all_silent_take_the_whole_update() -> None:
    scaled = Aim(omega=0.0).relax("w", 0, torch.ones(2, 3), MergeContext({"w": ActivationStatistics(torch.zeros(3))}))
    assert torch.equal(scaled, torch.ones(2, 3))


def test_the_control_shrinks_each_tensor_by_the_mean_of_aims_factors() -> None:
    deltas = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    aim, shrunk = (relaxed(step, deltas, figures()) for step in (Aim(omega=0.3), Shrink(omega=0.3)))
    for name in SHAPES:
        torch.testing.assert_close(shrunk[name], torch.full(SHAPES[name], float(aim[name].mean())))
    assert len(torch.unique(shrunk["linear.weight"])) == 1


def test_a_number_shrinks_everything_and_needs_no_statistics() -> None:
    step = Shrink(factor=0.25)
    assert step.needs == frozenset()
    assert all(torch.equal(relaxed(step, {n: d}, {})[n], 0.25 * d) for n, d in a_state(SHAPES).items())
    assert Shrink().needs == Aim().needs == {"activity"}


def chosen(*settings: Mapping[str, object]) -> Sequence[Aim | Mean]:
    return build_pipeline([Unit(name="mean"), *(Unit(name="aim", settings=dict(one)) for one in settings)]).steps  # type: ignore[return-value]


def test_one_measurement_serves_all_steps_or_they_are_refused() -> None:
    assert build_calibration_request(chosen()) is None
    assert build_calibration_request(chosen({})) == CalibrationRequest("server", 256)
    assert build_calibration_request(chosen({"statistics": "clients", "examples": None})) == CalibrationRequest(
        "clients", None
    )
    assert (
        build_calibration_request(
            build_pipeline([Unit(name="mean"), Unit(name="shrink", settings={"factor": 0.5})]).steps
        )
        is None
    )
    with pytest.raises(RecipeError, match=r"^merge: steps differ in statistics or examples.*; align them$"):
        build_calibration_request(chosen({}, {"statistics": "clients"}))


@pytest.mark.parametrize(("setting", "value"), [("omega", 1.2), ("omega", -0.1), ("quantile", 0.0), ("examples", 0)])
def test_settings_out_of_bounds_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(RecipeError, match=setting):
        build_pipeline([Unit(name="mean"), Unit(name="aim", settings={setting: value})])
