"""Stored hidden states come back bit by bit, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srr_dist.errors import StoreError
from srr_dist.pipeline.boundaries import Boundaries
from srr_dist.store import ObjectStore, RunArea


@pytest.fixture
def area(tmp_path: Path) -> RunArea:
    return RunArea(ObjectStore(str(tmp_path)), "ab" * 32)


def hidden(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def save(area: RunArea, block: int, dtype: torch.dtype = torch.float32) -> Path:
    """Store three sequences before ``block``; returns the folder of its objects."""
    boundaries = Boundaries(area)
    boundaries.complete(block, [boundaries.save(block, i, hidden(i, dtype)) for i in range(3)])
    return Path(area.store.url, area.path(f"boundaries/{block:05d}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boundary_read_by_another_process_is_bit_equal(area, dtype):
    save(area, 4, dtype)
    other = Boundaries(RunArea(ObjectStore(area.store.url), area.fingerprint))
    for i in range(3):
        found = other.load(4, i)
        assert found.dtype == dtype
        assert torch.equal(found, hidden(i, dtype))


def test_boundary_of_a_strided_tensor_holds_its_values(area):
    boundaries = Boundaries(area)
    strided = hidden(0).mT
    boundaries.complete(1, [boundaries.save(1, 0, strided)])
    assert torch.equal(boundaries.load(1, 0), strided)


def test_tokens_are_always_a_boundary(area):
    assert Boundaries(area).available() == {0}


def test_boundary_without_its_record_does_not_exist(area):
    Boundaries(area).save(4, 0, hidden(0))
    assert Boundaries(area).available() == {0}
    with pytest.raises(StoreError, match=r"boundaries/00004\.json"):
        Boundaries(area).load(4, 0)


def test_available_lists_complete_boundaries_only(area):
    save(area, 4)
    save(area, 12)
    Boundaries(area).save(8, 0, hidden(0))
    assert Boundaries(area).available() == {0, 4, 12}


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink])
def test_damaged_boundary_is_refused_by_name_and_gone_from_then_on(area, damage):
    save(area, 2)
    damage(save(area, 4) / "00001.safetensors")
    boundaries = Boundaries(area)
    assert torch.equal(boundaries.load(4, 0), hidden(0))
    with pytest.raises(StoreError, match=r"00004/00001\.safetensors: missing or damaged"):
        boundaries.load(4, 1)
    assert boundaries.available() == {0, 2}
    assert torch.equal(boundaries.load(2, 1), hidden(1))


def test_second_record_of_a_boundary_changes_nothing(area):
    save(area, 4)
    Boundaries(area).complete(4, ["00" * 32] * 3)
    assert torch.equal(Boundaries(area).load(4, 0), hidden(0))


def test_discarded_boundary_leaves_nothing(area):
    folder = save(area, 4)
    save(area, 8)
    Boundaries(area).discard(4)
    assert not folder.exists()
    assert Boundaries(area).available() == {0, 8}
    Boundaries(area).discard(4)  # again, as after a kill in the middle


def test_cleared_boundaries_leave_nothing_not_even_of_those_that_were_never_completed(area):
    save(area, 4)
    Boundaries(area).save(8, 0, hidden(0))
    Boundaries(area).clear()
    assert area.store.list() == {}


def test_gradients_lie_beside_the_boundaries_and_begin_at_the_head(area):
    save(area, 4)
    gradients = Boundaries(area, "gradients", given=6)
    assert gradients.available() == {6}
    gradients.complete(4, [gradients.save(4, 0, hidden(7))])
    assert gradients.available() == {4, 6}
    assert torch.equal(gradients.load(4, 0), hidden(7))
    assert torch.equal(Boundaries(area).load(4, 0), hidden(0))
    gradients.clear()
    assert (gradients.available(), Boundaries(area).available()) == ({6}, {0, 4})
