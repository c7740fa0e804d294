"""Codes that make up for each other's errors in both directions: along a row, and from one row to the next.

YAQA (arXiv 2505.22988) weighs the error of a layer by a moment of its outputs beside that of its inputs,
``tr(H_O Δ H_I Δᵀ)``. With ``H_O = U_O D_O U_Oᵀ`` and ``H_I = U_I D_I U_Iᵀ``, both U unit upper triangular,

    tr(H_O Δ H_I Δᵀ) = Σ_ij D_O,i D_I,j η_ij²,    η = U_Oᵀ Δ U_I,

and with ``P = Δ U_I`` a code rounded to the target

    T_ij = W_ij + Σ_{l<j} Δ_il U_I,lj + Σ_{k<i} U_O,ki P_kj

makes each term as small as the grid allows. This is error feedback with ``H_O ⊗ H_I`` in the place of H, one entry
after the other. Entry (i, j) waits for those above it and to its left alone, so that the entries of an antidiagonal
are rounded together, in m + n − 1 steps. Buffers have a row for each of them: (i, j) is at row i + j, place i.

Feedback reaches entries of the same and the next block of ``_TILE`` inputs (outputs) step by step. What is farther
away waits until the tile that it is meant for begins, and arrives in one product: tiles two further back are complete
by then, whatever the row. No rounding is put off for that, and tiles change nothing but the order of additions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from srr_dist.solve.grids import Grid
from srr_dist.solve.rounding import Feedback
from srr_dist.threads import one_thread

_TILE = 32
"""Inputs and outputs of a tile: less costs more products, more costs longer steps."""


def yaqa(
    W: Tensor, scale: Tensor, grid: Grid, inputs: Feedback, outputs: Feedback, zero: Tensor | None = None
) -> Tensor:
    """Codes of a weight under given scales and zero points, with feedback along inputs and outputs.

    Both are taken in the order of their own feedback; products run on one thread, which keeps their bits.

    Args:
        W: float32 ``[m, n]``.
        scale: bfloat16 ``[m, groups]``.
        grid: of the codes.
        inputs: the factor of ``H_I``, n inputs.
        outputs: the factor of ``H_O``, m outputs.
        zero: float32 ``[m, groups]``, or None.

    Returns:
        Of the grid's type ``[m, n]``.
    """
    place, group = (outputs.order[:, None], inputs.order), inputs.order // (W.shape[1] // scale.shape[1])
    weights, steps = W[place], scale.float()[place[0], group]
    zeros = None if zero is None else zero[place[0], group]
    tall = W.shape[0] > W.shape[1]  # the two sides are alike, and a step is as long as the first
    with one_thread():
        if tall:
            zeros = None if zeros is None else zeros.mT
            found = _Wavefront(weights.mT, steps.mT, zeros, inputs.U, outputs.U, grid).codes().mT
        else:
            found = _Wavefront(weights, steps, zeros, outputs.U, inputs.U, grid).codes()
    codes = torch.empty_like(found)
    codes[place] = found
    return codes.contiguous()


class _Wavefront:
    """Errors and targets by antidiagonals; places outside the matrix hold zeros, which change nothing."""

    def __init__(self, W: Tensor, steps: Tensor, zeros: Tensor | None, U_O: Tensor, U_I: Tensor, grid: Grid) -> None:
        self._shape, self._U_O, self._U_I, self._grid = W.shape, U_O, U_I, grid
        (m, n), beyond = W.shape, 2 * _TILE
        length = m + n - 1 + beyond
        # W, of which Q is taken away once it is known: by itself, and with what came along its row (P).
        self._error = W.new_zeros(length, 2, m)
        # What came from the rows before, then the codes.
        self._target = W.new_zeros(length, m + beyond)
        self._steps, self._zeros = W.new_ones(length, m), None if zeros is None else W.new_zeros(length, m)
        self._own, self._carried = (_by_entry(self._error[:, part], n) for part in (0, 1))
        self._received = _by_entry(self._target[:, :m], n)
        for entries, values in ((self._own, W), (self._carried, W), (_by_entry(self._steps, n), steps)):
            entries.copy_(values)
        if self._zeros is not None and zeros is not None:
            _by_entry(self._zeros, n).copy_(zeros)
        self._near_O = _near(U_O)
        # At step s the outputs i meet the inputs s − i: reversed, so that they are a range as well.
        self._near_I = pad(_near(U_I).flip(1), (m, _TILE))
        # Errors of complete tiles, as products want them.
        self._complete = W.new_empty(2, m, n)

    def codes(self) -> Tensor:
        """Round everything: ``[m, n]`` of the grid's type."""
        m, n = self._shape
        for start in range(0, m + n - 1, _TILE):
            self._arrive(start // _TILE)
            self._round(start, min(start + _TILE, m + n - 1))
        return self._received.to(self._grid.dtype)

    def _arrive(self, diagonal: int) -> None:
        """What complete tiles add to those of one antidiagonal of tiles, before their first step."""
        m, n = self._shape
        for tile in range(max(0, diagonal - (n - 1) // _TILE), min((m - 1) // _TILE, diagonal) + 1):
            rows, columns = (slice(start * _TILE, (start + 1) * _TILE) for start in (tile, diagonal - tile))
            if (before := columns.start - _TILE) > 0:
                last = slice(before - _TILE, before)
                self._complete[0, rows, last] = self._own[rows, last]
                self._carried[rows, columns].add_(self._complete[0, rows, :before] @ self._U_I[:before, columns])
            if (above := rows.start - _TILE) > 0:
                last = slice(above - _TILE, above)
                self._complete[1, last, columns] = self._carried[last, columns]
                self._received[rows, columns].add_(self._U_O[:above, rows].mT @ self._complete[1, :above, columns])

    def _round(self, start: int, stop: int) -> None:
        """Antidiagonals ``start`` … ``stop`` − 1, one after the other, on the outputs that they reach."""
        m, n = self._shape
        first, last = max(0, start - n + 1), min(m, stop)
        width, near = last - first, 2 * _TILE - 1
        reach = slice(m + n - stop + first, m + n - 1 - start + last)
        steps = self._steps[start:stop, first:last].unbind()
        zeros = [None] * len(steps) if self._zeros is None else self._zeros[start:stop, first:last].unbind()
        along = self._error[start + 1 : stop + near, 1, first:last].unfold(0, near, 1).mT.unbind()
        ahead, place = self._target.stride(0), (start + 1) * self._target.stride(0) + first + 1
        down = self._target.as_strided((stop - start, near, width), (ahead, ahead + 1, 1), place).unbind()
        near_I, near_O = self._near_I[:, reach].unfold(1, width, 1).unbind(1)[::-1], self._near_O[:, first:last]
        errors, targets = self._error[start:stop, :, first:last].unbind(), self._target[start:stop, first:last].unbind()
        for step, zero, error, target, right, below, feedback in zip(
            steps, zeros, errors, targets, along, down, near_I, strict=True
        ):
            own, carried = error.unbind()
            place_among = self._grid.position(target.add_(carried).div_(step))
            code = self._grid.clamp_(torch.round(place_among, out=target), zero)
            error.sub_((self._grid.points(code) * step).bfloat16())  # as readers will hold it
            right.addcmul_(own, feedback)
            below.addcmul_(carried, near_O)


def _by_entry(diagonals: Tensor, n: int) -> Tensor:
    """A view ``[m, n]`` of what lies by antidiagonals in ``[m + n − 1 or more, m]``."""
    ahead, place = diagonals.stride()
    return diagonals.as_strided((diagonals.shape[1], n), (ahead + place, ahead), diagonals.storage_offset())


def _near(U: Tensor) -> Tensor:
    """``U_j,j+t`` at row t − 1, place j, for t = 1 … 2 ``_TILE`` − 1; zeros where j + t is beyond the next block."""
    n, near = U.shape[0], 2 * _TILE - 1
    diagonals = pad(U, (0, near + 1)).as_strided((near, n), (1, n + near + 2), 1)
    places, distances = torch.arange(n, device=U.device), torch.arange(1, near + 1, device=U.device)[:, None]
    return diagonals.masked_fill((places + distances) // _TILE - places // _TILE > 1, 0.0)
