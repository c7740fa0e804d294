"""Codes of 2 to 8 bits <-> the dense bit stream of the compressed-tensors format ``pack-quantized``.

Every row is one little-endian, LSB-first stream of ``code + 2^(bits-1)``, cut into 32-bit words: code i of a row starts
at bit ``i · bits`` and may straddle two words. Unused high bits of a row's last word are zero.
"""

from __future__ import annotations

import math

import torch

_RUN = 8  # codes handled together: 8 codes of b bits are exactly b bytes, and fit the 8 bytes of an int64


def packed_width(n: int, bits: int) -> int:
    """Number of 32-bit words that hold ``n`` codes."""
    return math.ceil(n * bits / 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack ``codes``: int8 [m, n] in -2^(bits-1) .. 2^(bits-1)-1 into int32 [m, ceil(n·bits/32)].

    Raises:
        ValueError: a code needs more than ``bits`` bits, which would spill into its neighbours.
    """
    _check_bits(bits)
    offset = 1 << (bits - 1)
    low, high = int(codes.min()), int(codes.max())
    if low < -offset or high >= offset:
        raise ValueError(f"codes of {bits} bits must lie in {-offset}..{offset - 1}, found {low}..{high}")
    m, n = codes.shape
    levels = torch.nn.functional.pad(codes.to(torch.int16) + offset, (0, -n % 32))
    runs = torch.zeros(m, levels.shape[1] // _RUN, dtype=torch.int64, device=codes.device)
    for i in range(_RUN):
        runs |= levels[:, i::_RUN].to(torch.int64) << (bits * i)
    stream = runs.view(torch.uint8).view(m, -1, _RUN)[:, :, :bits].reshape(m, -1)
    return stream.view(torch.int32)[:, : packed_width(n, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Invert :func:`pack`: int32 [m, ceil(n·bits/32)] -> codes, int8 [m, n].

    Raises:
        ValueError: ``packed`` has another width than ``n`` codes of ``bits`` bits take.
    """
    _check_bits(bits)
    m, width = packed.shape
    if width != packed_width(n, bits):
        raise ValueError(f"{n} codes of {bits} bits take {packed_width(n, bits)} words a row, found {width}")
    stream = packed.contiguous().view(torch.uint8)
    count = math.ceil(n / _RUN)
    stream = torch.nn.functional.pad(stream, (0, max(0, count * bits - stream.shape[1])))[:, : count * bits]
    runs = torch.nn.functional.pad(stream.reshape(m, count, bits), (0, _RUN - bits)).view(torch.int64).squeeze(-1)
    codes = torch.empty(m, count * _RUN, dtype=torch.int8, device=packed.device)
    for i in range(_RUN):
        codes[:, i::_RUN] = (runs >> (bits * i) & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes[:, :n].contiguous()


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"packing is defined for 2 to 8 bits, found {bits}")
