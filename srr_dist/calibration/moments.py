"""The input moment H of a linear layer, summed over calibration tokens where the block lives.

Sequences are added in a fixed order: a product in float32 (bfloat16 inputs are multiplied exactly) of one sequence, or
of several short ones, and sums of products in float64. What a moment holds does therefore not depend on how sequences
were grouped into messages, nor on the number of workers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LQER_FLOOR = 1e-4
_PANELS = 4
_STRIP = 512
"""Rows of float32 sums that are added to float64 ones at once: a CPU converts them first, into memory of their own."""
_GATHERED = 512
"""Rows that a product has at least. Of fewer, adding its float32 results to float64 sums takes longer than itself: that
reads and writes 20 bytes for each of them, however few operations there were."""


def moment_bytes(features: int, scaling: str, bands: int = 1) -> int:
    """Memory of one accumulator, in bytes."""
    return 8 * math.prod(accumulator_shape(features, scaling, bands))


def waiting_bytes(rows: int, features: int, scaling: str) -> int:
    """Memory of what waits at most in one accumulator that is given so many rows at a time, in bytes."""
    waiting = (_GATHERED - 1) // rows * rows
    return 2 * 4 * waiting * features if scaling == "exact" else 0


class InputMoment:
    """Accumulates one shared input's moment.

    ========== ======================================================================= ======
    scaling    what stands for H                                                       source
    ========== ======================================================================= ======
    exact      ``E[x xᵀ]``                                                             QERA-exact, arXiv 2410.06040
    diag       ``diag(E[x_i²])``                                                       QERA-approx
    lqer       ``diag(s_i²)``, ``s_i = max over sequences of mean_t abs(x_ti)``,       LQER, arXiv 2402.02446
               at least 1e-4, divided by ``sqrt(min s · max s)``
    identity   the identity                                                            ZeroQuant-V2
    ========== ======================================================================= ======

    Of an ``exact`` moment in bands only the blocks along the diagonal are summed: what inputs of different bands have
    to do with each other is left out.

    Args:
        features: n, the width of the input.
        scaling: one of the names above.
        device: where the inputs are; products are computed there.
        total: float64 zeros of the accumulator's shape to add into (on another device or mapped from disk when memory
            is short); allocated on ``device`` by default.
        bands: equal parts of the inputs, one after the other.
    """

    def __init__(
        self,
        features: int,
        scaling: str,
        device: torch.device | str = "cpu",
        total: Tensor | None = None,
        bands: int = 1,
    ) -> None:
        self.features, self.scaling = features, scaling
        shape = accumulator_shape(features, scaling, bands)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device) if total is None else total
        if tuple(self.total.shape) != shape or self.total.dtype != torch.float64:
            raise ValueError(f"total: expected float64 {shape}, found {self.total.dtype} {tuple(self.total.shape)}")
        self.tokens = 0
        self.excluded = 0
        self.weight = 0
        """Tokens, those that count several times so often."""
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, x: Tensor, first: int = 1) -> None:
        """Add one sequence ``x: [T, n]``; rows with NaN or Inf are left out and counted.

        Its first token counts as often as ``first`` says: all others attend to it, so that an error there reaches them
        all. Of ``lqer`` it is the mean that counts it so.
        """
        finite = torch.isfinite(x.sum(-1, dtype=torch.float32))  # a NaN or Inf anywhere in a row reaches its sum
        weighted = x if first == 1 else torch.cat((x[:1] * first, x[1:]))
        more = first - 1
        if not bool(finite.all()):  # what else there is to ask a GPU for is asked in this rare case alone
            self.excluded += int((~finite).sum())
            more *= int(finite[0])
            x, weighted = x[finite], weighted[finite]
        if len(x) == 0:
            return
        self.tokens += len(x)
        self.weight += len(x) + more
        match self.scaling:
            case "exact":
                self._add_products(weighted, x)
            case "diag":
                squares = weighted.float().mul(x.float()).sum(0, dtype=torch.float64)
                self.total += squares.to(self.total.device)
            case "lqer":
                mean = weighted.float().abs().sum(0, dtype=torch.float64) / (len(x) + more)
                torch.maximum(self.total, mean.to(self.total.device), out=self.total)

    def add(self, left: Tensor, right: Tensor, rows: int) -> None:
        """Add ``leftᵀ right: [n, n]``, finite, which is ``xᵀ x`` of so many rows x; ``exact`` scaling only.

        It is for rows that need not be formed for their sum.
        """
        self.tokens += rows
        self.weight += rows
        self._add_products(left, right)

    def settle(self) -> None:
        """Add the rows that wait for more; whatever reads the sums does so first.

        Only the lower triangle is added to, panel by panel: symmetry saves three eighths of the arithmetic.
        """
        if not self._waiting:
            return
        left, right = (rows[0] if len(rows) == 1 else torch.cat(rows) for rows in zip(*self._waiting, strict=True))
        self._waiting.clear()
        for start, part in self.parts().items():
            (rows, columns), band = part.shape, start - start % self._width
            products = gram(left[:, start : start + rows], right[:, band : band + columns]).to(part.device)
            for sums, strip in zip(part.split(_STRIP), products.split(_STRIP), strict=True):
                sums.add_(strip)

    def merge(self, other: InputMoment) -> None:
        """Add what another moment of this kind was fed."""
        self.tokens, self.excluded = self.tokens + other.tokens, self.excluded + other.excluded
        self.weight += other.weight
        self.settle()
        other.settle()
        theirs = other.total.to(self.total.device)
        if self.scaling == "lqer":
            torch.maximum(self.total, theirs, out=self.total)
        else:
            self.total += theirs

    def clear(self) -> None:
        """Begin anew."""
        self._waiting.clear()
        self.total.zero_()
        self.tokens = self.excluded = self.weight = 0

    def value(self) -> Tensor:
        """H as float64: ``[n, n]`` for ``exact``, in bands ``[bands, b, b]``, else its diagonal ``[n]``.

        Zeros when no token was seen.
        """
        match self.scaling:
            case "identity":
                return torch.ones(self.features, dtype=torch.float64, device=self.total.device)
            case _ if self.tokens == 0:
                return torch.zeros_like(self.total)
            case "exact":
                self._mirror()
                return self.total / self.weight
            case "diag":
                return self.total / self.weight
            case "lqer":
                s = self.total.clamp_min(_LQER_FLOOR)
                return (s / (s.min() * s.max()).sqrt()).square()
        raise ValueError(f"scaling: {self.scaling!r} is not known")

    def take(self) -> Tensor:
        """``value()`` in the memory of the sums, which are gone with it: so large a matrix is not held twice."""
        if self.scaling != "exact" or self.tokens == 0:
            return self.value()
        self._mirror()
        value, self.total = self.total.div_(self.weight), self.total.new_empty(0)
        return value

    def parts(self) -> dict[int, Tensor]:
        """First row -> the rows of ``total`` that are added to, views: all that a moment is but for its counts.

        Of a matrix these are its panels up to the diagonal; the rest follows from symmetry.
        """
        self.settle()
        if self.scaling != "exact":
            return {0: self.total}
        return {
            band * self._width + start: block[start:stop, :stop]
            for band, block in enumerate(self._blocks())
            for start, stop in self._panels()
        }

    @property
    def _width(self) -> int:
        """Of a band."""
        return self.total.shape[-1]

    def _blocks(self) -> Tensor:
        return self.total.view(-1, self._width, self._width)

    def _panels(self) -> list[tuple[int, int]]:
        """First and last row of each panel of a block."""
        panel = -(-self._width // _PANELS)
        return [(start, min(start + panel, self._width)) for start in range(0, self._width, panel)]

    def _mirror(self) -> None:
        """Fill the panels above the diagonal from those below, which alone are added to."""
        self.settle()
        for block in self._blocks():
            for start, stop in self._panels():
                block[:start, start:stop] = block[start:stop, :start].mT

    def _add_products(self, left: Tensor, right: Tensor) -> None:
        """Add ``leftᵀ right``, as soon as enough rows have come."""
        self._waiting.append((left, right))
        if sum(len(rows) for rows, _ in self._waiting) >= _GATHERED:
            self.settle()
        else:  # whoever owns these rows may write to them after this call
            self._waiting[-1] = left.clone(), right.clone()


def accumulator_shape(features: int, scaling: str, bands: int = 1) -> tuple[int, ...]:
    """Shape of an accumulator's float64 tensor."""
    if scaling != "exact":
        return (features,)
    return (features, features) if bands == 1 else (bands, features // bands, features // bands)


def first_token_weight(share: float, tokens: int) -> int:
    """How many tokens the first of so many counts for, to be that share of them all; never less than one."""
    return max(1, round(share * (tokens - 1) / (1.0 - share)))


def gram(a: Tensor, b: Tensor) -> Tensor:
    """``aᵀ b`` with float32 results; bfloat16 factors are multiplied exactly and added in float32."""
    if a.dtype == torch.bfloat16 and a.is_cuda:
        return torch.mm(a.mT, b, out_dtype=torch.float32)
    return a.float().mT @ b.float()
