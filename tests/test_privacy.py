"""Clipping and noise by themselves: norms in closed form, noise beside a readable twin and by its distribution."""

import hmac
import math
import stat
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from scipy import stats
from torch import Tensor

from fedtune.errors import ClientUpdateError, StoreError
from fedtune.privacy import (
    ROUNDING_SLACK,
    NormalStream,
    add_gaussian_noise,
    clip_to_norm,
    compute_max_update_norm,
    compute_noise_std,
    load_or_create_noise_key,
)
from fedtune.recipe.schema import PrivacySettings

KEY = bytes(range(32))


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((tensor.double() ** 2).sum()) for tensor in tensors.values()))


def deltas(scale: float) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    shapes = {"a": (300, 40), "b": (40,), "c": ()}
    return {name: scale * torch.randn(shape, generator=random) for name, shape in shapes.items()}


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 0.02, 1.0, 1e6])
def test_the_norm_over_all_tensors_is_the_smaller_of_its_own_and_the_bound(scale: float) -> None:
    before = deltas(scale)
    after = clip_to_norm(before, 1.5)
    assert norm(after) == pytest.approx(min(norm(before), 1.5), rel=1e-7)
    assert norm(after) <= 1.5 * (1 + ROUNDING_SLACK)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor * min(1.0, 1.5 / norm(before)), rtol=1e-6, atol=0)


def test_what_is_within_the_bound_keeps_its_bits() -> None:
    before = deltas(1e-3)
    after = clip_to_norm(before, norm(before))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_has_no_norm_is_not_sent(value: float) -> None:
    spoilt = deltas(1.0)
    spoilt["b"][7] = value
    with pytest.raises(ClientUpdateError, match=r"^the training diverged .*; lower train\.lr$"):
        clip_to_norm(spoilt, 1.0)


def twin(key: bytes, place: str, index: int) -> float:
    """The number at a place of the row, one by one: four Box-Muller cosines, halved."""
    stream = Cipher(ChaCha20(hmac.new(key, place.encode(), "sha256").digest(), bytes(16)), mode=None).encryptor()
    words = struct.unpack("<8Q", stream.update(bytes(64 * (index + 1)))[-64:])
    uniform = [((word >> 11) + 0.5) / 2**53 for word in words]
    pairs = zip(uniform[:4], uniform[4:], strict=True)
    return sum(math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v) for u, v in pairs) / 2


def test_noise_is_what_a_readable_twin_says_however_it_is_cut_into_pieces() -> None:
    zeros = {"wide": torch.zeros(3, 50_000), "none": torch.zeros(())}
    found = add_gaussian_noise(zeros, 2.5, KEY, "run", 7)
    for index in (0, 1, 49_999, 50_000, 149_999):
        assert float(found["wide"].view(-1)[index]) == pytest.approx(2.5 * twin(KEY, "run/7/wide", index), rel=1e-6)
    assert float(found["none"]) == pytest.approx(2.5 * twin(KEY, "run/7/none", 0), rel=1e-6)
    assert not zeros["wide"].any(), "what is given stays as it was"


def test_a_row_may_be_drawn_from_anywhere() -> None:
    row = NormalStream(KEY, "here")
    assert np.array_equal(row.draw_normals(70_000, 5), row.draw_normals(0, 70_005)[70_000:])


def test_noise_is_standard_normal() -> None:
    count = 400_000
    drawn = NormalStream(KEY, "here").draw_normals(0, count)
    assert abs(drawn.mean()) < 5 / math.sqrt(count)
    assert abs(drawn.var() - 1) < 5 * math.sqrt(2 / count)
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / math.sqrt(count)


def test_noise_of_other_places_and_other_secrets_is_unrelated() -> None:
    count = 100_000
    rows = [
        NormalStream(KEY, "a", 1),
        NormalStream(KEY, "a", 2),
        NormalStream(KEY, "b", 1),
        NormalStream(KEY[::-1], "a", 1),
    ]
    apart = np.corrcoef([row.draw_normals(0, count) for row in rows]) - np.eye(4)
    assert np.abs(apart).max() < 5 / math.sqrt(count)
    assert np.array_equal(NormalStream(KEY, "a", 1).draw_normals(0, 9), NormalStream(KEY, "a", 1).draw_normals(0, 9))


def test_noise_is_added_to_values_in_double_precision() -> None:
    values = torch.full((1000,), 3.0)
    expected = torch.from_numpy(3.0 + 1e-4 * NormalStream(KEY, "x", "t").draw_normals(0, 1000)).float()
    assert torch.equal(add_gaussian_noise({"t": values}, 1e-4, KEY, "x")["t"], expected)


def test_a_secret_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    made = load_or_create_noise_key(tmp_path / "one")
    assert len(made) == 32
    assert load_or_create_noise_key(tmp_path / "one") == made != load_or_create_noise_key(tmp_path / "two")
    assert stat.S_IMODE((tmp_path / "one" / "noise.key").stat().st_mode) == 0o600


def test_a_secret_that_is_none_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "noise.key").write_bytes(b"")
    with pytest.raises(StoreError, match=r"noise\.key is damaged; delete it"):
        load_or_create_noise_key(tmp_path)


def test_norms_of_contributions_with_their_own_noise_stay_below_what_is_believed() -> None:
    own = PrivacySettings(clipping_norm=0.5, noise_multiplier=2.0, noise_added_by="clients")
    assert compute_noise_std(own) == pytest.approx(1.0, rel=1e-5)
    assert compute_max_update_norm(PrivacySettings(clipping_norm=0.5, noise_multiplier=2.0), 10**6) == 0.5 * (
        1 + ROUNDING_SLACK
    )
    for elements in (1, 100, 20_000):
        bound = compute_max_update_norm(own, elements)
        assert bound == pytest.approx(0.5 + math.sqrt(elements) + 8, rel=1e-5)
        start = {"t": torch.zeros(elements)}
        start["t"][0] = 0.5
        norms = [norm(add_gaussian_noise(start, compute_noise_std(own), KEY, turn)) for turn in range(50)]
        assert max(norms) < bound
        assert min(norms) > math.sqrt(elements) - 8
