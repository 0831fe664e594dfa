"""Renormalising steps mend what was written, as they mend whole tensors in memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedtune.merging import MergeContext
from fedtune.merging.renormalise.repair import Repair
from fedtune.offline_merge import MergeConfig, prepare_merge, write_merged_model
from fedtune.offline_merge.output_folder import OutputFolder
from tests.fusion_models import tensors


class Net(nn.Module):
    """An MLP that takes its inputs by name."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        found: Tensor = self.layers(x)
        return found


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for seed in (1, 2):
        folder = tmp_path / f"net{seed}"
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "test"}')
        save_file(Net(seed).state_dict(), folder / "model.safetensors", {"format": "pt"})
    return [str(tmp_path / "net1"), str(tmp_path / "net2")]


def evidence() -> MergeContext:
    random = torch.Generator().manual_seed(0)
    return MergeContext(
        model=Net(0), calibration_batches=[{"x": torch.randn(32, 6, generator=random)} for _ in range(3)]
    )


def config(folders: list[str], **keys: object) -> MergeConfig:
    return MergeConfig.model_validate({"merge_method": "linear", "models": folders, **keys})


def test_repair_is_what_it_is_in_memory(tmp_path: Path, folders: list[str]) -> None:
    write_merged_model(prepare_merge(config(folders)), tmp_path / "plain", "")
    write_merged_model(prepare_merge(config(folders, renormalise=["repair"])), tmp_path / "out", "", context=evidence())
    plain, found = tensors(tmp_path / "plain"), tensors(tmp_path / "out")
    ends = [(0.5, tensors(Path(folder))) for folder in folders]
    wanted = plain | Repair().renormalise(plain, ends, evidence())
    assert all((found[name] - tensor).abs().max() < 1e-6 for name, tensor in wanted.items())
    assert not torch.equal(found["layers.2.weight"], plain["layers.2.weight"])
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_one_that_is_stopped_while_it_writes_changes_goes_on_with_the_same_ones(
    tmp_path: Path, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(folders, renormalise=["repair"])
    write_merged_model(prepare_merge(asked), tmp_path / "alone", "", context=evidence())
    real, calls = OutputFolder.write_rows, []

    def stopping(self: OutputFolder, name: str, start: int, rows: Tensor) -> None:
        calls.append(name)
        if len(calls) == 8:  # six tensors, then the second of what repair changes
            raise KeyboardInterrupt
        real(self, name, start, rows)

    monkeypatch.setattr(OutputFolder, "write_rows", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_merged_model(prepare_merge(asked), tmp_path / "out", "", context=evidence())
    monkeypatch.setattr(OutputFolder, "write_rows", real)
    write_merged_model(prepare_merge(asked), tmp_path / "out", "", context=evidence())
    alone, found = tensors(tmp_path / "alone"), tensors(tmp_path / "out")
    assert all(torch.equal(alone[name], tensor) for name, tensor in found.items())
