"""Grids: which values a quantized weight may take, and how they are coded.

A grid turns ``W: [..., m, n]`` into integer ``codes`` of the same shape and one ``scale`` per group of
``group_size`` neighbouring inputs, so that ``Q = points(codes) · scale``; a code's point is the code itself unless the
grid has a table. Every scale is a bfloat16 value, because that is what the checkpoint stores. Under a grid with zero
points, codes are what is left when the group's zero point is taken from the stored ones: products stay what they are,
and only the range that codes may take differs between groups.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor

from srr_dist.config import BITS, NF4_BLOCKS
from srr_dist.errors import ConfigError
from srr_dist.solve import normalfloat

PER_CHANNEL = -1
"""A ``group_size`` of −1 stands for one group per output row."""

# The smallest normal bfloat16 is 2^-126; a scale below it would lose its significand.
_MIN_EXPONENT, _MAX_EXPONENT = -126, 127

_SHARES = tuple(1.0 - step / 10 for step in range(6))
"""Parts of the way from 0 to the smallest and to the largest weight that an asymmetric group may reach."""


@dataclass(frozen=True)
class Grid(ABC):
    """Integer codes, or the values they stand for, times a scale per group.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: inputs that share a scale, or ``PER_CHANNEL``.
    """

    bits: int
    group_size: int
    name: ClassVar[str]
    trials: ClassVar[tuple[float, ...]]
    """Multiples of a group's scale that are worth trying in its place."""
    continuous: ClassVar[bool]
    """Whether any bfloat16 but 0 is a scale, so that scales can be tuned."""
    symmetric: ClassVar[bool] = True
    """Whether all groups have the same codes, so that no zero points are stored."""
    dtype: ClassVar[torch.dtype] = torch.int8
    """Of codes."""
    codebook: ClassVar[str | None] = None
    """Name of the table in which codes are looked up."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits: expected 2 to 8, found {self.bits}; choose another --bits")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise ConfigError(f"group_size: expected a positive number or -1 (per channel), found {self.group_size}")

    @property
    @abstractmethod
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code as it is stored."""

    @abstractmethod
    def _scale(self, absmax: Tensor) -> Tensor:
        """Scale (float32) of groups whose largest magnitude is ``absmax``."""

    def fits(self, in_features: int) -> bool:
        """Whether rows of ``in_features`` inputs are a whole number of groups."""
        return self.group_size == PER_CHANNEL or in_features % self.group_size == 0

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight: the codes and their bfloat16 scales."""
        return self.bits + 16 / (in_features if self.group_size == PER_CHANNEL else self.group_size)

    def scale(self, W: Tensor) -> Tensor:
        """The scales that reach the largest magnitude of each group: bfloat16 ``[..., m, groups]``."""
        return self._scale(self.grouped(W).abs().amax(-1)).bfloat16()

    def candidates(self, W: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Scales and zero points that are worth trying; the first are the grid's own, which reach every weight.

        Yields:
            scale: bfloat16 ``[..., m, groups]``; zero: None, or whole numbers within ``code_range``, float32 of the
            same shape.
        """
        own = self.scale(W)
        yield own, None
        for factor in self.trials:
            yield (own.float() * factor).bfloat16(), None

    def zero(self, codes: Tensor) -> Tensor | None:
        """Zero points to store with ``codes: [..., m, n]``: None, or ``[..., m, groups]`` of the same type."""
        return None

    def points(self, codes: Tensor) -> Tensor:
        """What codes stand for under a scale of 1: float32, of their shape."""
        return codes.float()

    def position(self, numbers: Tensor) -> Tensor:
        """Where among the codes numbers (float32, in units of the scale) lie; halfway between points at one half."""
        return numbers

    def clamp_(self, codes: Tensor, zero: Tensor | None, margin: float = 0.0) -> Tensor:
        """Bring codes (float32, overwritten) into the range that zero points leave them, widened by a margin.

        ``zero`` has the first dimensions of codes, for example those of ``grouped`` without the last.
        """
        low, high = self.code_range
        if zero is None:
            return codes.clamp_(low - margin, high + margin)
        zero = zero.reshape(*zero.shape, *[1] * (codes.dim() - zero.dim()))
        return codes.add_(zero).clamp_(low - margin, high + margin).sub_(zero)

    def encode(self, W: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Codes of the nearest points under given scales and zero points: ``dtype``, of W's shape."""
        codes = self.clamp_(self.position(self.grouped(W) / scale.float().unsqueeze(-1)).round_(), zero)
        return codes.to(self.dtype).reshape(W.shape)

    def quantize(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Round ``W: [..., m, n]`` (float32) to the nearest point of the grid.

        Returns:
            codes: ``dtype`` ``[..., m, n]``; scale: bfloat16 ``[..., m, groups]``.
        """
        scale, zero = next(self.candidates(W))
        return self.encode(W, scale, zero), scale

    def dequantize(self, codes: Tensor, scale: Tensor) -> Tensor:
        """``Q: [..., m, n]`` in float32, exactly as readers of the checkpoint will hold it."""
        return dequantize(self.points(codes), scale, torch.bfloat16).float()

    def grouped(self, W: Tensor) -> Tensor:
        """W by groups, ``[..., m, groups, group_size]``; ConfigError if its rows are no whole number of them."""
        n = W.shape[-1]
        if not self.fits(n):
            raise ConfigError(
                f"group_size: {n} inputs are no multiple of {self.group_size}; "
                "choose a --group-size that divides them or --exclude the layer"
            )
        return W.reshape(*W.shape[:-1], -1, n if self.group_size == PER_CHANNEL else self.group_size)


def dequantize(points: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``points · scale`` in ``dtype``: the product of points ``[..., m, n]`` and bfloat16 ``[..., m, groups]``.

    It is taken in float32, where it is exact for integer codes (8 + 8 significant bits), and rounded to ``dtype``.
    """
    groups = points.to(torch.float32, copy=True).reshape(*scale.shape, -1)
    return groups.mul_(scale.float().unsqueeze(-1)).reshape(points.shape).to(dtype)


@dataclass(frozen=True)
class MXIntGrid(Grid):
    """MXINT: a shared power-of-two scale, sign-magnitude codes of ``bits`` bits (b = 2 is ternary).

    The scale is ``2^(floor(log2 absmax) − (b − 2))`` (Open Compute Project, Microscaling formats, with the block's
    shared exponent as in QERA, arXiv 2410.06040). Every value is exact in bfloat16.
    """

    name: ClassVar[str] = "mxint"
    trials: ClassVar[tuple[float, ...]] = (0.5, 2.0)
    continuous: ClassVar[bool] = False

    @property
    def code_range(self) -> tuple[int, int]:
        """±(2^(b−1) − 1): sign and magnitude."""
        top = 2 ** (self.bits - 1) - 1
        return -top, top

    def _scale(self, absmax: Tensor) -> Tensor:
        exponent = torch.frexp(absmax).exponent - 1 - (self.bits - 2)  # frexp: absmax = f · 2^e with f in [0.5, 1)
        # 2^e as the bits of a float32: exact on every device, which a power function does not promise.
        bits: Tensor = (exponent.clamp(_MIN_EXPONENT, _MAX_EXPONENT) + 127) << 23
        scale: Tensor = bits.view(torch.float32)
        return scale


@dataclass(frozen=True)
class IntGrid(Grid):
    """Symmetric integers with a bfloat16 scale, ``absmax / (2^(b−1) − ½)``.

    The half step lets the range −2^(b−1) … 2^(b−1) − 1 reach both ends with an equal error, as compressed-tensors'
    symmetric scheme does. A search may take a negative scale: the longer end of the range then lies on the side of the
    positive weights.
    """

    name: ClassVar[str] = "int"
    trials: ClassVar[tuple[float, ...]] = tuple(sign * (1.0 - step / 32) for step in range(19) for sign in (1, -1))[1:]
    continuous: ClassVar[bool] = True

    @property
    def code_range(self) -> tuple[int, int]:
        """Two's complement: −2^(b−1) to 2^(b−1) − 1."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def _scale(self, absmax: Tensor) -> Tensor:
        # A group of zeros codes to zeros under any scale; a normal number keeps readers from dividing by zero.
        scale: Tensor = (absmax / (2 ** (self.bits - 1) - 0.5)).clamp_min(math.ldexp(1.0, _MIN_EXPONENT))
        return scale


@dataclass(frozen=True)
class AsymmetricIntGrid(IntGrid):
    """Integers with a bfloat16 scale and a zero point of ``bits`` bits: the 2^b codes lie where the weights do.

    The grid's own scales and zero points reach from the smallest to the largest weight of a group, 0 among them. A
    search moves both ends inwards, each on its own, and tries what ``IntGrid`` would.
    """

    name: ClassVar[str] = "int-asym"
    symmetric: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.int16
    """The difference of two numbers of eight bits takes nine."""

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight: the codes, their bfloat16 scales and their zero points."""
        per_group = 16 + self.bits
        return self.bits + per_group / (in_features if self.group_size == PER_CHANNEL else self.group_size)

    def candidates(self, W: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Every pair of ends between the whole range and ``_SHARES`` of it, then those of ``IntGrid``."""
        groups = self.grouped(W)
        bottom, top = groups.amin(-1).clamp_max_(0.0), groups.amax(-1).clamp_min_(0.0)
        for below, above in product(_SHARES, _SHARES):
            yield self._reaching(below * bottom, above * top)
        for scale, _ in super().candidates(W):
            # −s times −2^(b−1) … 2^(b−1) − 1 is s times −2^(b−1) + 1 … 2^(b−1).
            yield scale.abs(), -(scale < 0).float()

    def zero(self, codes: Tensor) -> Tensor | None:
        """Of the zero points that let every code of a group be stored, the nearest to 0."""
        (low, high), groups = self.code_range, self.grouped(codes)
        least, most = low - groups.amin(-1), high - groups.amax(-1)
        return torch.zeros_like(least).clamp_(least, most)

    def _reaching(self, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of groups that reach from ``bottom <= 0`` to ``top >= 0``."""
        low, high = self.code_range
        steps = high - low
        scale = (top / steps - bottom / steps).clamp_min_(math.ldexp(1.0, _MIN_EXPONENT)).bfloat16()
        return scale, (low - torch.round(bottom / scale.float())).clamp_(low, high)


@dataclass(frozen=True)
class NF4Grid(Grid):
    """NormalFloat: codes of 4 bits in a table of values between −1 and 1, times the largest magnitude of a block.

    Blocks are of the sizes that bitsandbytes reads. A search may take a negative scale, which gives the side with more
    values to the negative weights, and one beyond the largest magnitude. Source: QLoRA, arXiv 2305.14314.
    """

    name: ClassVar[str] = "nf4"
    trials: ClassVar[tuple[float, ...]] = (-1.0, *(s * n / 32 for n in range(22, 39) if n != 32 for s in (1, -1)))
    continuous: ClassVar[bool] = True
    codebook: ClassVar[str | None] = "nf4"

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ConfigError(f"bits: nf4 has 4, found {self.bits}; choose --bits 4 or another --grid")
        if self.group_size not in NF4_BLOCKS:
            sizes = ", ".join(map(str, NF4_BLOCKS))
            raise ConfigError(f"group_size: nf4 has blocks of {sizes}, found {self.group_size}; choose one of them")

    @property
    def code_range(self) -> tuple[int, int]:
        """Positions in the table."""
        return 0, len(normalfloat.VALUES) - 1

    def bits_per_weight(self, in_features: int) -> float:
        """Stored bits per weight: the codes and their scales, which bitsandbytes keeps in float32."""
        return self.bits + 32 / self.group_size

    def points(self, codes: Tensor) -> Tensor:
        """Values of the table."""
        return normalfloat.values(codes)

    def position(self, numbers: Tensor) -> Tensor:
        """Codes and what lies between them."""
        return normalfloat.position(numbers)

    def _scale(self, absmax: Tensor) -> Tensor:
        # Of a group of zeros a number of which every part that is tried is normal.
        return absmax.clamp_min(math.ldexp(1.0, _MIN_EXPONENT + 2))


_GRIDS: dict[str, type[Grid]] = {grid.name: grid for grid in (MXIntGrid, IntGrid, AsymmetricIntGrid, NF4Grid)}


def make_grid(name: str, bits: int, group_size: int) -> Grid:
    """The grid called ``name``; raises ConfigError for an unknown name, width or group size."""
    if name not in _GRIDS:
        raise ConfigError(f"grid: expected one of {', '.join(_GRIDS)}, found {name!r}")
    return _GRIDS[name](bits, group_size)
