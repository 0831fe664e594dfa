"""A state on disk names its tensors without reading them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedtune.wire.stored_state import StoredState


def test_a_name_is_looked_up_without_reading_the_file(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    save_file({"weight": torch.arange(3.0)}, file)
    state = StoredState(file)
    assert torch.equal(state["weight"], torch.arange(3.0))
    file.unlink()
    assert "weight" in state
    assert "bias" not in state
    with pytest.raises(KeyError):
        state["bias"]
