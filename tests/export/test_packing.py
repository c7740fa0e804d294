"""The packed layout: golden words, round trip, and agreement with the installed compressed-tensors."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from srr_dist.export.packing import pack, packed_width, unpack

# A row of eleven codes per width; the words follow by hand from `code + 2^(bits-1)`, least significant bit first.
GOLDEN = {
    2: ([-2, -1, 0, 1, -2, -1, 0, 1, 1, 1, -2], "e4e40f00"),
    3: ([-4, -3, -2, -1, 0, 1, 2, 3, 3, 2, -4], "88c6fa3700000000"),
    4: ([-8, -7, -6, -5, 0, 1, 2, 7, 7, -8, 3], "1032 98fa 0f0b 0000"),
    8: ([-128, -127, -1, 0, 1, 127, 2, 3, 4, 5, 6], "00 01 7f 80 81 ff 82 83 84 85 86 00"),
}


def random_codes(rows: int, n: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, (rows, n), generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("bits", GOLDEN)
def test_pack_golden_row_gives_the_documented_bytes(bits):
    codes, expected = GOLDEN[bits]
    assert pack(torch.tensor([codes], dtype=torch.int8), bits).numpy().tobytes() == bytes.fromhex(expected)


@given(st.integers(2, 8), st.integers(1, 4), st.integers(1, 130), st.integers(0, 2**31))
def test_unpack_after_pack_returns_the_codes(bits, rows, n, seed):
    codes = random_codes(rows, n, bits, seed)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(n, bits))
    assert packed.dtype == torch.int32
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 10, 11, 31, 32, 33, 96, 576])
def test_pack_equals_compressed_tensors(bits, n):
    codes = random_codes(5, n, bits)
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)


def test_pack_code_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"codes of 3 bits must lie in -4\.\.3, found 0\.\.4"):
        pack(torch.tensor([[0, 4]], dtype=torch.int8), 3)


def test_unpack_wrong_width_is_refused():
    with pytest.raises(ValueError, match="33 codes of 3 bits take 4 words a row, found 3"):
        unpack(torch.zeros(2, 3, dtype=torch.int32), 3, 33)


@pytest.mark.parametrize("bits", [1, 9])
def test_pack_unsupported_width_is_refused(bits):
    with pytest.raises(ValueError, match=f"2 to 8 bits, found {bits}"):
        pack(torch.zeros(1, 1, dtype=torch.int8), bits)
