"""Rounding with error feedback: GPTQ, in its form as LDLQ (arXiv 2210.17323; QuIP, arXiv 2307.13304, shows them equal).

With ``H = U D Uᵀ``, U unit upper triangular, the error of a row ``δ = w − q`` is ``δ H δᵀ = Σ_j D_j η_j²`` with
``η_j = δ_j + Σ_{i<j} δ_i U_ij``. Taken from left to right, ``q_j = round(w_j + Σ_{i<j} δ_i U_ij)`` makes each term as
small as the grid allows. One Cholesky factorization and no inverse. Inputs are taken in descending order of their
moment, so that those which count most are rounded while others can still make up for them; scales belong to groups of
neighbours and are fixed before, so that the order costs readers nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srr_dist.solve.grids import Grid

DAMPING = 0.01
"""Share of the mean diagonal that is added to H: what a few massive inputs leave of the others is noise below it."""

_RANGE = 32
"""Inputs between which errors go one by one."""


@dataclass(frozen=True)
class Feedback:
    """What the errors of earlier inputs add to the targets of later ones.

    Attributes:
        order: int64 ``[n]``, the inputs in the order in which they are rounded.
        U: float32 ``[n, n]``, unit upper triangular, rows and columns in this order.
        damping: what was added to the diagonal, as a share of its mean.
    """

    order: Tensor
    U: Tensor
    damping: float


def feedback_of(H: Tensor) -> Feedback:
    """Factor a moment, float32 ``[n, n]`` of mean diagonal about 1, in float64; the caller keeps it to one thread."""
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    backwards = order.flip(0)  # the Cholesky factor of the reversed matrix, reversed, is upper triangular
    factor, damping = _cholesky(H[backwards[:, None], backwards].double())
    factor.div_(factor.diagonal().clone())
    return Feedback(order, factor.float().flip(0, 1), damping)


def _cholesky(A: Tensor) -> tuple[Tensor, float]:
    """The lower factor of A (float64, overwritten) damped as little as it takes, and that damping."""
    damping = DAMPING
    A.diagonal().add_(damping)
    while True:
        factor, failed = torch.linalg.cholesky_ex(A)
        if not int(failed):
            return factor, damping
        A.diagonal().add_(9.0 * damping)
        damping *= 10.0


def gptq(W: Tensor, scale: Tensor, grid: Grid, feedback: Feedback, zero: Tensor | None = None) -> Tensor:
    """Codes of ``W: [m, n]`` (float32) under given scales and zero points, of the grid's type ``[m, n]``.

    Works on inputs as rows. A range of inputs is rounded half by half, and between its halves the errors of the first
    reach the targets of the second in one product; only inside a short range do they go from input to input.
    """
    m, n = W.shape
    order, U = feedback.order, feedback.U
    delta = W.mT[order]  # holds weights until they are rounded, then errors
    target = delta.clone()
    group = order // (n // scale.shape[1])
    steps = scale.float().mT[group]
    zeros = [None] * scale.shape[1] if zero is None else list(zero.mT.contiguous())
    zero_of = [zeros[g] for g in group.tolist()]
    codes = torch.empty(n, m, dtype=grid.dtype, device=W.device)

    def round_range(start: int, stop: int) -> None:
        if stop - start > _RANGE:
            middle = start + max(_RANGE, (stop - start) // (2 * _RANGE) * _RANGE)
            round_range(start, middle)
            target[middle:stop].addmm_(U[start:middle, middle:stop].mT, delta[start:middle])
            round_range(middle, stop)
            return
        for j in range(start, stop):
            code = grid.clamp_((target[j] / steps[j]).round_(), zero_of[j])
            codes[j] = code
            delta[j] -= code.mul_(steps[j]).bfloat16()  # as readers will hold it
            target[j + 1 : stop].addr_(U[j, j + 1 : stop], delta[j])

    round_range(0, n)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.mT.contiguous()
