"""MagMax and OPCM of fine-tunes on disk are those of the same deltas in memory."""

from pathlib import Path

import pytest
import torch

from fedtune.errors import RecipeError
from fedtune.offline_merge import prepare_merge
from tests.fusion_models import base_and_tuned, tensors
from tests.merge_examples import a_step, merged
from tests.test_fusion_merge import a_config
from tests.test_fusion_merge import merged as merge_folders


@pytest.mark.parametrize("name", ["magmax", "opcm"])
def test_fine_tunes_on_disk_are_merged_as_their_deltas_in_memory(tmp_path: Path, name: str) -> None:
    base, *tuned = base_and_tuned(tmp_path)
    start = {key: tensor.float() for key, tensor in tensors(base).items()}
    deltas = [{key: tensors(one)[key].float() - start[key] for key in start} for one in tuned]
    wanted = merged(a_step(name, {}), deltas)
    found = merge_folders(a_config(name, tuned, base, [1.0] * len(tuned)), tmp_path / "out")
    for key, tensor in found.items():
        torch.testing.assert_close(tensor.float(), start[key] + wanted[key], rtol=1e-4, atol=1e-5)


def test_a_setting_over_the_depth_is_refused_where_whole_models_are_read(tmp_path: Path) -> None:
    base, *tuned = base_and_tuned(tmp_path)
    config = a_config("opcm", tuned, base, parameters={"alpha": [0.3, 0.7]})
    with pytest.raises(RecipeError, match=r"^parameters: opcm reads whole models; give one value in place of a list$"):
        prepare_merge(config)
    prepare_merge(a_config("opcm", tuned, base, parameters={"alpha": [0.3, 0.3]}))
    prepare_merge(a_config("ties", tuned, base, parameters={"lambda": [0.3, 0.7]}))
