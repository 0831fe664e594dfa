"""Adapters that cannot be merged: one sentence each, and nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.offline_merge.adapters.adapter_merge import AdapterMerge
from fedtune.offline_merge.adapters.merge_adapters import merge_adapters
from tests.adapter_folders import PLAIN, several, spoil, step

FC = "base_model.model.fc.lora_A.weight"
BAD: list[tuple[Callable[[Path], object], str]] = [
    (spoil(lambda c, t: c.update(peft_type="IA3")), "is a IA3 adapter; only LoRA and DoRA adapters are merged"),
    (spoil(lambda c, t: c.update(lora_bias=True)), "has lora_bias, which no product of two factors can carry; fold it"),
    (spoil(lambda c, t: c.update(use_dora=True)), "has use_dora True, but .* None; give adapters of one kind"),
    (spoil(lambda c, t: t.pop(FC)), "has only factor B of fc; fetch it again"),
    (spoil(lambda c, t: t.update({FC: t[FC][:1]})), "has factors of fc that do not multiply; fold it with peft"),
    (
        spoil(lambda c, t: t.update({FC: t[FC][:, :5].contiguous()})),
        "changes fc in another shape than the others; give adapters of one",
    ),
    (
        spoil(lambda c, t: t[FC].fill_(float("nan"))),
        f"holds values that are not finite in {FC}; train or fetch it again",
    ),
    (
        spoil(lambda c, t: t.update({"a.lora_E": torch.ones(1)})),
        "holds a.lora_E, which is no LoRA factor; fold it with",
    ),
    (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors; save it with"),
    (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 20), "cannot be read .*; fetch it again"),
    (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json cannot be read as JSON"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folders = several(tmp_path, PLAIN, PLAIN)
    change(folders[1])
    with pytest.raises(FedtuneError, match=message):
        merge_adapters(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_heads_and_places_that_do_not_hold_are_refused(tmp_path: Path) -> None:
    folders = several(tmp_path, {"modules_to_save": ["head"]}, {"modules_to_save": ["head"]})
    with pytest.raises(FedtuneError, match=r"^merge: the weights of the adapters that have .*head.bias sum to zero"):
        merge_adapters(folders, tmp_path / "out", AdapterMerge(step("task-arithmetic"), [1, -1]))
    with pytest.raises(FedtuneError, match=r"^merge: fedit is for rounds of a federation; name linear, ties or"):
        merge_adapters(folders, tmp_path / "out", AdapterMerge(step("fedit")))
    with pytest.raises(FedtuneError, match="exists already; choose another folder"):
        merge_adapters(folders, folders[0])
    name = "base_model.model.head.bias"
    spoil(lambda c, t: t.update({name: torch.zeros(5)}))(folders[1])
    with pytest.raises(FedtuneError, match=rf"^{name} has shapes .* in the adapters; only heads of one shape"):
        merge_adapters(folders, tmp_path / "out")
