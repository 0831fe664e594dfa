"""``fedtune.merge``: the numbers of the command, on state dicts and on folders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import fedtune
from fedtune.cli.merge import merge as merge_command
from fedtune.errors import FedtuneError
from tests.fusion_models import base_and_tuned, tensors

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("ties", {"density": 0.4}),
    ("dare_ties", {"density": 0.5, "seed": 7}),
    ("task_arithmetic", {"lambda": 0.7}),
    ("sce", {}),
]
WEIGHTS = [0.5, 0.3, 0.2]


def run_command(folders: list[Path], output: Path, method: str, parameters: dict[str, Any]) -> dict[str, Tensor]:
    base, *tuned = map(str, folders)
    options = [f"--set={key}={value}" for key, value in parameters.items() if key != "seed"]
    seed = ["--seed", str(parameters.get("seed", 0))]
    words = [*tuned, "--base-model", base, "--method", method, "--weights", "0.5,0.3,0.2", *options, *seed]
    done = CliRunner().invoke(merge_command, [*words, "-o", str(output)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return tensors(output)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, one in expected.items() if not torch.equal(found[name], one)]


@pytest.mark.parametrize(("method", "parameters"), METHODS, ids=[name for name, _ in METHODS])
def test_the_numbers_are_those_of_the_command(method: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    folders = base_and_tuned(tmp_path)
    expected = run_command(folders, tmp_path / "command", method, parameters)
    base, *tuned = folders
    written = fedtune.merge(tuned, base=base, method=method, weights=WEIGHTS, output=tmp_path / "library", **parameters)
    assert written == tmp_path / "library"
    assert_same(tensors(written), expected)
    states = [tensors(folder) for folder in folders]
    before = [{name: one.clone() for name, one in state.items()} for state in states]
    merged = fedtune.merge(states[1:], base=states[0], method=method, weights=WEIGHTS, **parameters)
    assert_same(merged, expected)
    for state, was in zip(states, before, strict=True):
        assert_same(state, was)


def test_tensors_that_are_tied_stay_so_and_types_are_kept() -> None:
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        shared = torch.randn(5, 4, dtype=torch.bfloat16)
        states.append({"embed.weight": shared, "head.weight": shared, "scale": torch.tensor(float(seed))})
    merged = fedtune.merge(states[1:], base=states[0], method="dare_linear", density=0.5)
    assert merged["head.weight"] is merged["embed.weight"]
    assert merged["embed.weight"].dtype == torch.bfloat16
    assert merged["scale"].shape == ()


ONE = {"w": torch.ones(2, 2)}


@pytest.mark.parametrize(
    ("models", "more", "message"),
    [
        ([], {}, "merge: there is no model"),
        ([ONE, "folder"], {}, "give state dicts or folders, not both"),
        ([ONE], {"output": "merged"}, "drop output"),
        (["folder"], {}, "name the folder of the result"),
        ([ONE, ONE], {"weights": [1]}, "weights has 1 numbers for 2 models"),
        ([ONE, {"v": torch.ones(2, 2)}], {}, "model 2 has no tensor w, which model 1 has"),
        ([ONE, {"w": torch.ones(3, 2)}], {}, r"the first tensor that differs is w: \[3, 2\] in model 2"),
        ([ONE, {"w": torch.ones(2, 2).half()}], {}, "model 2 is float16 and model 1 float32"),
        ([ONE, ONE], {"method": "ties"}, "ties merges what models differ from a base"),
        ([ONE, ONE], {"method": "tise", "base": ONE}, "there is no 'tise'; did you mean 'ties'"),
        ([ONE, ONE], {"method": "ties", "base": ONE, "densety": 1}, "ties has no parameter 'densety'"),
        ([ONE, {"w": torch.full((2, 2), float("nan"))}], {}, "model 2: w holds values that are not finite"),
    ],
)
def test_what_cannot_be_merged_is_refused(models: list[Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(FedtuneError, match=message):
        fedtune.merge(models, **more)
