from pathlib import Path

import pytest
import torch

from fedtune.errors import ClientUpdateError
from fedtune.techniques.pruning._packed_positions import declare_positions, pack_positions, scatter_positions
from fedtune.wire.client_update import pack
from fedtune.wire.update_checks import check_client_update


@pytest.mark.parametrize("entries", [1, 254, 255, 256, 5000])
@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_places_come_back_with_their_values(entries: int, share: float) -> None:
    dense = torch.randn(entries).double() * (torch.rand(entries) < share)
    places = dense.nonzero().flatten()
    packed = pack_positions("wake", places, entries)
    assert torch.equal(scatter_positions("wake", packed, dense[places], entries), dense)
    assert sum(tensor.nbytes for tensor in packed.values()) == len(places) + -(-entries // 255)


def test_what_is_packed_has_the_form_that_is_asked_for(tmp_path: Path) -> None:
    packed = pack_positions("wake", torch.tensor([0, 254, 255, 999]), 1000)
    path = tmp_path / "sent.safetensors"
    path.write_bytes(pack(packed))
    check_client_update(path, {}, declare_positions("wake", 4, 1000))
    path.write_bytes(pack({**packed, "wake_count": torch.tensor([1, 1, 0, 1], dtype=torch.uint8)}))
    with pytest.raises(ClientUpdateError, match="wake_count adds up to 3 instead of 4"):
        check_client_update(path, {}, declare_positions("wake", 4, 1000))


def test_a_place_behind_the_end_is_let_go() -> None:
    packed = pack_positions("wake", torch.tensor([3]), 10)
    packed["wake_offset"][0] = 200
    assert not scatter_positions("wake", packed, torch.ones(1), 10).any()
