"""From given codes to better ones: each in turn at the best value beside all others.

Where error feedback looks only ahead, descent looks both ways: ``q_j ← round(q_j + (δ H)_j / H_jj)`` (QuantEase, arXiv
2309.01885).

With an output side, ``tr(H_O Δ H Δᵀ)``, the best value of a row beside all other rows is the one of that row by itself
for a target moved by ``Σ_{k≠i} H_O,ik δ_k / H_O,ii``. Rows of which every eighth is taken depend little on each other,
so that they move side by side; where the error says that they do not, the halves of such a part move one after the
other.
"""

from __future__ import annotations

from torch import Tensor

from srr_dist.solve.grids import Grid
from srr_dist.solve.metric import Metric, inner
from srr_dist.solve.rounding import DAMPING, sweep
from srr_dist.threads import one_thread

PARTS = 8
"""Of a matrix's rows, which move one after the other."""

_MOST_PARTS = 64
"""Where so few depend on each other too much."""


def pulls(H: Tensor) -> Tensor:
    """How far an error of input i moves the best value at j, ``H_ij / H_jj``, float32 ``[n, n]``.

    H (float32 ``[n, n]``, of mean diagonal about 1) is damped as for feedback.
    """
    damped = H.clone()
    damped.diagonal().add_(DAMPING)
    return damped.div_(damped.diagonal().clone())


def descend_codes(W: Tensor, codes: Tensor, scale: Tensor, grid: Grid, pull: Tensor) -> Tensor:
    """Each code in turn at the best value beside all others.

    Args:
        W: float32 ``[m, n]``.
        codes: of the grid's type ``[m, n]``, where to begin.
        scale: bfloat16 ``[m, groups]``.
        grid: of the codes.
        pull: ``pulls`` of the moment.

    Returns:
        As codes.
    """
    size, zero = W.shape[1] // scale.shape[1], grid.zero(codes)
    Q = grid.dequantize(codes, scale).mT.contiguous()
    target = (pull.mT @ (W.mT - Q)).add_(Q)
    steps = scale.float().mT.repeat_interleave(size, dim=0)
    zeros = None if zero is None else zero.mT.repeat_interleave(size, dim=0)
    return sweep(Q, target, steps, zeros, pull, grid).mT.contiguous()


def descend_across(W: Tensor, codes: Tensor, scale: Tensor, grid: Grid, metric: Metric) -> Tensor:
    """The codes of each part of the rows in turn at better values beside all other rows, wherever that is so.

    Products run on one thread, which keeps their bits.

    Args:
        W: float32 ``[m, n]``.
        codes: of the grid's type ``[m, n]``, where to begin.
        scale: bfloat16 ``[m, groups]``.
        grid: of the codes.
        metric: of n inputs and m outputs, both sides full, each in one block.

    Returns:
        As codes; their error is not larger.
    """
    assert metric.outputs is not None
    H_O, pull, codes = metric.outputs.damped, pulls(metric.H), codes.clone()
    error = W - grid.dequantize(codes, scale)
    parts = [(first, PARTS) for first in reversed(range(min(PARTS, len(W))))]
    with one_thread():
        while parts:
            first, step = parts.pop()
            rows = slice(first, None, step)
            own = H_O[rows]
            across = own @ error
            target = W[rows] + across / own[:, rows].diagonal().unsqueeze(1) - error[rows]
            found = descend_codes(target, codes[rows], scale[rows], grid, pull)
            left = W[rows] - grid.dequantize(found, scale[rows])
            change = left - error[rows]
            slope = metric.right(change)
            if inner(2.0 * across + own[:, rows] @ change, slope) <= 0.0:
                codes[rows], error[rows] = found, left
            elif step < _MOST_PARTS and first + step < len(W):
                parts += [(first + step, 2 * step), (first, 2 * step)]
    return codes
