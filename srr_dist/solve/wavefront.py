"""Codes that make up for each other's errors in both directions: along a row, and from one row to the next.

YAQA (arXiv 2505.22988) weighs the error of a layer by a moment of its outputs beside that of its inputs,
``tr(H_O Δ H_I Δᵀ)``. With ``H_O = U_O D_O U_Oᵀ`` and ``H_I = U_I D_I U_Iᵀ``, both U unit upper triangular,

    tr(H_O Δ H_I Δᵀ) = Σ_ij D_O,i D_I,j η_ij²,    η = U_Oᵀ Δ U_I,

and with ``P = Δ U_I`` a code rounded to the target

    T_ij = W_ij + Σ_{l<j} Δ_il U_I,lj + Σ_{k<i} U_O,ki P_kj

makes each term as small as the grid allows. This is error feedback with ``H_O ⊗ H_I`` in the place of H, one entry
after the other. Entry (i, j) waits for those above it and to its left alone, so that the entries of an antidiagonal
are rounded together, in m + n − 1 steps. Buffers have a row for each of them: (i, j) is at row i + j, place i.

Feedback reaches entries of the same and the next ``_TILE`` inputs (outputs) step by step. What is farther away waits
until the tile that it is meant for begins: tiles two further back are complete by then, whatever the row. It arrives in
one batch of products for an antidiagonal of tiles, and from still farther in products for tiles ``_SPAN`` times as
large. No rounding is put off for that, and tiles change nothing but the order of additions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from srr_dist.solve.grids import Grid
from srr_dist.solve.rounding import Feedback
from srr_dist.threads import one_thread

_TILE = 24
"""Inputs and outputs of a tile: less costs more products, more costs longer steps."""

_SPAN = 4
"""Tiles along a side of a large one."""

_WINDOW = 2 * _SPAN - 2
"""Tiles before the last one that may lie within the same large tile or the one before, which is not complete."""


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
        self._shape, self._grid = W.shape, grid
        more = [-size % _TILE for size in W.shape]
        self._U_O, self._U_I = (pad(U, (0, extra, 0, extra)) for U, extra in zip((U_O, U_I), more, strict=True))
        m, n = self._size = len(self._U_O), len(self._U_I)
        length, before = m + n - 1 + 2 * _TILE, (_WINDOW + 1) * _TILE
        # W, of which Q is taken away once it is known: by itself, and with what came along its row (P).
        self._error = W.new_zeros(length, 2, m)
        # What came from the rows before, then the codes.
        self._target = W.new_zeros(length, m + 2 * _TILE)
        self._steps, self._zeros = W.new_ones(length, m), None if zeros is None else W.new_zeros(length, m)
        self._own, self._carried = (_by_entry(self._error[:, part], n) for part in (0, 1))
        self._received = _by_entry(self._target[:, :m], n)
        _fill(W, self._own, self._carried)
        _fill(steps, _by_entry(self._steps, n))
        if self._zeros is not None and zeros is not None:
            _fill(zeros, _by_entry(self._zeros, n))
        self._near_O, self._window_O = _near(self._U_O), _window(self._U_O).mT
        # At step s the outputs i meet the inputs s − i: reversed, so that they are a range as well.
        self._near_I, self._window_I = pad(_near(self._U_I).flip(1), (m, _TILE)), _window(self._U_I).flip(0)
        # Errors of complete tiles, by themselves and carried, as products want them: behind a window of zeros.
        self._settled, self._passed = W.new_zeros(m, before + n), W.new_zeros(before + m, n)

    def codes(self) -> Tensor:
        """Round everything: ``[m, n]`` of the grid's type."""
        steps = sum(self._size) - 1
        for start in range(0, steps, _TILE):
            self._arrive(start // _TILE)
            self._round(start, min(start + _TILE, steps))
        found = torch.empty(self._shape, dtype=self._grid.dtype, device=self._error.device)
        for part, codes in zip(found.split(_TILE, dim=1), self._received.split(_TILE, dim=1), strict=True):
            part.copy_(codes[: len(part), : part.shape[1]])
        return found

    def _arrive(self, diagonal: int) -> None:
        """What complete tiles add to those of one antidiagonal of tiles, before their first step."""
        before = (_WINDOW + 1) * _TILE
        if diagonal > 1:
            done = self._tiles(diagonal - 2, _TILE)
            _aslant(self._settled[:, before:], diagonal - 2, done).copy_(_aslant(self._own, diagonal - 2, done))
            _aslant(self._passed[before:], diagonal - 2, done).copy_(_aslant(self._carried, diagonal - 2, done))
        if diagonal % _SPAN == 0:
            self._arrive_from_afar(diagonal // _SPAN)
        if not (tiles := self._tiles(diagonal, _TILE)):
            return
        first = len(self._window_I) - 1 - diagonal + tiles.start
        settled = _aslant(self._settled, diagonal, tiles, columns=_WINDOW * _TILE)
        passed = _aslant(self._passed, diagonal, tiles, rows=_WINDOW * _TILE)
        along = settled @ self._window_I[first : first + len(tiles)]
        down = self._window_O[tiles.start : tiles.stop] @ passed
        _aslant(self._carried, diagonal, tiles).add_(along)
        _aslant(self._received, diagonal, tiles).add_(down)

    def _arrive_from_afar(self, diagonal: int) -> None:
        """The same for an antidiagonal of large tiles."""
        size, before = _SPAN * _TILE, (_WINDOW + 1) * _TILE
        for i in self._tiles(diagonal, size):
            j = diagonal - i
            rows, columns = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            if j > 1:
                end = (j - 1) * size
                self._carried[rows, columns].add_(self._settled[rows, before : before + end] @ self._U_I[:end, columns])
            if i > 1:
                end = (i - 1) * size
                self._received[rows, columns].add_(
                    self._U_O[:end, rows].mT @ self._passed[before : before + end, columns]
                )

    def _tiles(self, diagonal: int, size: int) -> range:
        """Along the outputs, the tiles of an antidiagonal of tiles."""
        m, n = self._size
        return range(max(0, diagonal - (n - 1) // size), min((m - 1) // size, diagonal) + 1)

    def _round(self, start: int, stop: int) -> None:
        """Antidiagonals ``start`` … ``stop`` − 1, one after the other, on the outputs that they reach."""
        m, n = self._size
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


def _fill(values: Tensor, *entries: Tensor) -> None:
    """Copy a matrix to such views, some columns at once: neighbours in a row lie far apart there."""
    rows = len(values)
    for start in range(0, values.shape[1], _TILE):
        part = values[:, start : start + _TILE]
        for view in entries:
            view[:rows, start : start + part.shape[1]] = part


def _aslant(entries: Tensor, diagonal: int, tiles: range, rows: int = 0, columns: int = 0) -> Tensor:
    """A view ``[tiles, rows, columns]`` of what begins at the tiles ``(i, diagonal − i)`` of any view of a matrix.

    Without a number of rows or columns those of a tile.
    """
    down, along = entries.stride()
    place = entries.storage_offset() + _TILE * (tiles.start * down + (diagonal - tiles.start) * along)
    shape = len(tiles), rows or _TILE, columns or _TILE
    return entries.as_strided(shape, (_TILE * (down - along), down, along), place)


def _window(U: Tensor) -> Tensor:
    """For each tile J, feedback from the ``_WINDOW`` tiles before J − 1: ``[tiles, _WINDOW · _TILE, _TILE]``.

    Zeros from tiles whose large one is two back or more.
    """
    n, tiles, before = len(U), len(U) // _TILE, _WINDOW + 1
    windows = pad(U, (0, 0, before * _TILE, 0)).as_strided((tiles, _WINDOW * _TILE, _TILE), (_TILE * (n + 1), n, 1))
    later = torch.arange(tiles, device=U.device)[:, None]
    earlier = later - before + torch.arange(_WINDOW * _TILE, device=U.device) // _TILE
    return windows.masked_fill((earlier // _SPAN < later // _SPAN - 1).unsqueeze(2), 0.0)


def _near(U: Tensor) -> Tensor:
    """``U_j,j+t`` at row t − 1, place j, for t = 1 … 2 ``_TILE`` − 1; zeros where j + t is beyond the next block."""
    n, near = U.shape[0], 2 * _TILE - 1
    diagonals = pad(U, (0, near + 1)).as_strided((near, n), (1, n + near + 2), 1)
    places, distances = torch.arange(n, device=U.device), torch.arange(1, near + 1, device=U.device)[:, None]
    return diagonals.masked_fill((places + distances) // _TILE - places // _TILE > 1, 0.0)
