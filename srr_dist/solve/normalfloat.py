"""NF4: sixteen values between −1 and 1, as many below as above a weight's quantiles if weights are normal.

QLoRA, arXiv 2305.14314, appendix E, has the values to float32; 0 is one of them, so that seven are negative and eight
positive. A *code* is a value's position among them, from 0 to 15, and a *position* is a real number that says where
among the codes a number lies: halfway from one value to the next is halfway from one code to the next, so that the
nearest value is the one whose code is nearest.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_CELLS = 32
"""Equal parts of −1 … 1, each with one value at most inside it: no two values are nearer than 0.079."""


def values(codes: Tensor) -> Tensor:
    """The value (float32) of each code."""
    return _pick(_tables(codes.device)[0], codes)


def position(numbers: Tensor) -> Tensor:
    """Where numbers (float32) lie among the codes, 0 to 15, linear between two values; beyond ±1 the end's code."""
    table, first, slope, offset = _tables(numbers.device)
    numbers = numbers.clamp(-1.0, 1.0)
    # A search among the values for each number would take ten times as long: its branches cannot be foreseen.
    segment = _pick(first, (numbers + 1.0).mul_(_CELLS / 2))
    segment += numbers > _pick(table, segment + 1)
    return torch.addcmul(_pick(offset, segment), _pick(slope, segment), numbers)


def _pick(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.int().flatten()).view(index.shape)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The values; by cell the code of the last value up to its beginning; by code slope and offset of positions."""
    table = torch.tensor(VALUES, dtype=torch.float64)
    edges = torch.arange(_CELLS + 1, dtype=torch.float64) * (2.0 / _CELLS) - 1.0
    first = torch.bucketize(edges, table, right=True).sub_(1).clamp_max_(len(VALUES) - 2)
    slope = 1.0 / table.diff()
    offset = torch.arange(len(VALUES) - 1) - table[:-1] * slope
    return table.float().to(device), first.int().to(device), slope.float().to(device), offset.float().to(device)
