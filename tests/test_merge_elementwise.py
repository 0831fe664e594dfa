"""Trimmed mean, Fisher and RegMean: what they do to entries and what statistics they want."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedtune.errors import ModelError, RecipeError, SourceError
from fedtune.merging import CombineStep, MergeContext, MergeInput, StatisticsFile, bind_combine
from fedtune.merging.combine.fisher import Fisher
from fedtune.merging.combine.regmean import RegMean
from fedtune.merging.combine.trimmed_mean import TrimmedMean
from tests.merge_examples import Held, a_model, merged, models, whole

WEIGHTS = [0.5, 0.3, 0.2]


def weighed(step: CombineStep, deltas: list[Tensor], statistics: list[Tensor], weights: list[float]) -> Tensor:
    shape = tuple(deltas[0].shape)
    given = [
        MergeInput(Held({"w": delta}), weight, {}, Held({"w": measured}))
        for delta, measured, weight in zip(deltas, statistics, weights, strict=True)
    ]
    settled = bind_combine(step, {"w": shape}, given, MergeContext())
    return whole(settled.combine, "w", shape, settled.merge_inputs)


def test_the_trimmed_mean_leaves_out_both_ends_entry_by_entry() -> None:
    values = torch.tensor([[1.0, 900.0], [2.0, -1.0], [3.0, 0.0], [4.0, 1.0], [-500.0, 2.0]])
    found = merged(TrimmedMean(trim_fraction=0.2), [{"w": row} for row in values])["w"]
    assert found.tolist() == [2.0, 1.0]


def test_a_trimmed_mean_that_would_cut_nothing_is_refused() -> None:
    with pytest.raises(
        RecipeError,
        match=r"trim_fraction 0.2 needs at least 5 models to remove one at each end, but 4 were given; raise",
    ):
        merged(TrimmedMean(trim_fraction=0.2), models(4))


def test_fisher_is_linear_when_information_is_equal() -> None:
    deltas = [model["weight"] for model in models(3)]
    found = weighed(Fisher(), deltas, [a_model(5)["weight"].square()] * 3, WEIGHTS)
    wanted = sum((w * x for w, x in zip(WEIGHTS, deltas, strict=True)), torch.zeros(()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_fisher_weighs_each_entry_and_falls_back_to_the_mean_where_there_is_no_information() -> None:
    deltas = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 2.0])]
    found = weighed(Fisher(), deltas, [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])], [3.0, 1.0])
    assert found.tolist() == pytest.approx([1.1, 2.0, 1.25])


def grams(inputs: list[Tensor]) -> list[Tensor]:
    return [x.T @ x / len(x) for x in inputs]


def regressed(weights: list[Tensor], inputs: list[Tensor], shrink: float) -> Tensor:
    deltas = [0.0 + weight for weight in weights]
    return weighed(RegMean(off_diagonal_scale=shrink), deltas, grams(inputs), [1 / len(weights)] * len(weights))


def test_regmean_is_linear_when_grams_are_equal() -> None:
    weights, inputs = [model["weight"] for model in models(2)], torch.randn(50, 14)
    found = regressed(weights, [inputs, inputs], 0.9)
    torch.testing.assert_close(found, (weights[0] + weights[1]) / 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shrink", [1.0, 0.9])
def test_regmean_gives_each_model_its_outputs_when_inputs_do_not_overlap(shrink: float) -> None:
    inputs = [torch.randn(50, 14), torch.randn(50, 14)]
    inputs[0][:, 6:] = 0
    inputs[1][:, :6] = 0
    weights = [model["weight"] for model in models(2)]
    found = regressed(weights, inputs, shrink)
    for weight, x in zip(weights, inputs, strict=True):
        torch.testing.assert_close(x @ found.T, x @ weight.T, rtol=0, atol=1e-4)


def test_regmean_is_the_least_squares_solution() -> None:
    weights = [model["weight"].double() for model in models(2)]
    inputs = [torch.randn(60, 14).double(), 3 * torch.randn(60, 14).double()]
    wanted = torch.linalg.lstsq(torch.cat(inputs), torch.cat([x @ w.T for x, w in zip(inputs, weights, strict=True)]))
    found = regressed([w.float() for w in weights], [x.float() for x in inputs], 1.0)
    torch.testing.assert_close(found, wanted.solution.T.float(), rtol=0, atol=1e-4)


def test_an_input_that_no_model_ever_had_takes_the_mean() -> None:
    inputs = [torch.randn(50, 14), torch.randn(50, 14)]
    for x in inputs:
        x[:, 3] = 0
    weights = [model["weight"] for model in models(2)]
    found = regressed(weights, inputs, 0.9)
    torch.testing.assert_close(found[:, 3], (weights[0] + weights[1])[:, 3] / 2, rtol=0, atol=1e-5)


def test_tensors_without_statistics_take_the_mean() -> None:
    given = [MergeInput(Held(model), 0.5, {}, Held({"weight": torch.eye(14)})) for model in models(2)]
    for step in (RegMean(), Fisher()):
        found = whole(step, "bias", (19,), given)
        torch.testing.assert_close(found, (models(2)[0]["bias"] + models(2)[1]["bias"]) / 2)


def test_statistics_are_read_from_a_safetensors_file(tmp_path: Path) -> None:
    save_file({"w": torch.arange(12.0).reshape(4, 3).bfloat16(), "s": torch.tensor(2.0)}, tmp_path / "f.safetensors")
    found = StatisticsFile(tmp_path / "f.safetensors")
    assert "w" in found
    assert "x" not in found
    assert found("w", 1, 3).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert found("s", 0, 1).item() == 2
    assert found("w", 0, 1).dtype == torch.float32


def test_what_is_no_file_of_statistics_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.pkl").write_bytes(b"no tensors")
    for name in ("f.pkl", "absent"):
        with pytest.raises(SourceError, match=r"is not a safetensors file \(.*\); give a file of statistics$"):
            StatisticsFile(tmp_path / name)


@pytest.mark.parametrize(
    ("statistics", "error", "sentence"),
    [
        ([None, None], RecipeError, "fisher needs statistics of every model, but model 1 has none; give a file"),
        ([{"w": 1}, None], RecipeError, "fisher needs statistics of every model, but model 2 has none; give a file"),
        ([{"w": 1}, {"v": 1}], ModelError, "the statistics of model 2 lack w, which others have; measure all"),
        ([{"v": 1}, {"v": 1}], ModelError, "the statistics name no tensor of the models; measure these models"),
    ],
)
def test_missing_statistics_are_refused(
    statistics: list[dict[str, int] | None], error: type[Exception], sentence: str
) -> None:
    held = [None if one is None else Held({name: torch.ones(2) for name in one}) for one in statistics]
    given = [MergeInput(Held({"w": torch.ones(2)}), 0.5, {}, one) for one in held]
    with pytest.raises(error, match=sentence):
        bind_combine(Fisher(), {"w": (2,)}, given, MergeContext())


def test_regmean_refuses_statistics_that_are_no_gram_matrices() -> None:
    with pytest.raises(ModelError, match=r"needs a Gram matrix of 14 x 14 for w, but its statistics have shape \[14\]"):
        weighed(RegMean(), [a_model(0)["weight"]], [torch.ones(14)], [1.0])


def test_fisher_refuses_statistics_of_another_shape() -> None:
    with pytest.raises(ModelError, match=r"needs statistics of shape \[23, 14\] for w"):
        weighed(Fisher(), [a_model(0)["weight"]], [torch.ones(23, 23)], [1.0])
