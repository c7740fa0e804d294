"""Codes that make up for each other's errors from left to right: error feedback.

This is GPTQ in its form as LDLQ (arXiv 2210.17323; QuIP, arXiv 2307.13304, shows them equal).

With ``H = U D Uᵀ``, U unit upper triangular, the error of a row ``δ = w − q`` is ``δ H δᵀ = Σ_j D_j η_j²`` with
``η_j = δ_j + Σ_{i<j} δ_i U_ij``. Taken from left to right, ``q_j = round(w_j + Σ_{i<j} δ_i U_ij)`` makes each term as
small as the grid allows. One Cholesky factorization and no inverse. Inputs are taken in descending order of their
moment, so that those which count most are rounded while others can still make up for them; scales belong to groups of
neighbours and are fixed before, so that the order costs readers nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        D: float32 ``[n]``, positive, with ``U D Uᵀ`` the damped moment in this order.
        damping: what was added to the diagonal, as a share of its mean.
    """

    order: Tensor
    U: Tensor
    D: Tensor
    damping: float


def feedback_of(H: Tensor) -> Feedback:
    """Factor a moment, float32 ``[n, n]`` (``[n]``) of mean diagonal about 1, in float64; the caller's one thread."""
    if H.dim() == 1:
        n = H.shape[0]
        return Feedback(torch.arange(n, device=H.device), torch.eye(n, device=H.device), H + DAMPING, DAMPING)
    order = torch.argsort(H.diagonal(), descending=True, stable=True)
    damping = DAMPING
    while (factor := _cholesky(H, order, damping)) is None:
        damping *= 10.0
    lengths = factor.diagonal().clone()
    factor = factor.div_(lengths).float()
    return Feedback(order, factor.flip(0, 1), lengths.square_().float().flip(0), damping)


def _cholesky(H: Tensor, order: Tensor, damping: float) -> Tensor | None:
    """The lower factor of the damped H in reverse order, float64, which reversed is upper triangular; None without one.

    It takes the place of the matrix, which for that lies column by column: of a wide layer either takes gigabytes.
    """
    backwards = order.flip(0)
    A = H.mT[backwards[:, None], backwards].double().mT
    A.diagonal().add_(damping)
    failed = torch.empty(0, dtype=torch.int32, device=H.device)
    torch.linalg.cholesky_ex(A, out=(A, failed))
    return None if int(failed) else A


def gptq(W: Tensor, scale: Tensor, grid: Grid, feedback: Feedback, zero: Tensor | None = None) -> Tensor:
    """Codes of ``W: [m, n]`` (float32) under given scales and zero points, of the grid's type ``[m, n]``."""
    order = feedback.order
    weights, group = W.mT[order], order // (W.shape[1] // scale.shape[1])
    steps = scale.float().mT[group]
    zeros = None if zero is None else zero.mT[group]
    codes = sweep(weights, weights.clone(), steps, zeros, feedback.U, grid)
    restored = torch.empty_like(codes)
    restored[order] = codes
    return restored.mT.contiguous()


def sweep(moved: Tensor, target: Tensor, steps: Tensor, zeros: Tensor | None, U: Tensor, grid: Grid) -> Tensor:
    """Round inputs, which are rows here, from the first to the last, each moving the targets of those after it.

    Args:
        moved: float32 ``[n, m]``, what each input had before; becomes how far it has moved.
        target: float32 ``[n, m]``, what each input would be if no other moved; overwritten.
        steps: float32 ``[n, m]``, the scales.
        zeros: ``[n, m]``, the zero points; None without.
        U: float32 ``[n, n]``: input i moving by δ_i adds ``δ_i U_ij`` to the target of j.
        grid: of the codes.

    Returns:
        Codes, of the grid's type ``[n, m]``.
    """
    codes = torch.empty(target.shape, dtype=grid.dtype, device=target.device)
    for start, middle, stop in _halves(0, len(target)):
        if middle < stop:
            target[middle:stop].addmm_(U[start:middle, middle:stop].mT, moved[start:middle])
        else:
            here = slice(start, stop)
            own = None if zeros is None else zeros[here]
            codes[here] = _one_by_one(moved[here], target[here], steps[here], own, U[here, here], grid)
    return codes


def _one_by_one(moved: Tensor, target: Tensor, steps: Tensor, zeros: Tensor | None, U: Tensor, grid: Grid) -> Tensor:
    """The sweep of one short range, from input to input; codes in float32."""
    codes = torch.empty_like(target)
    # Views of all rows at once: for a few hundred outputs, taking them one by one would cost more than the sums.
    rows = zip(*(each.unbind() for each in (target, steps, codes, moved, U)), strict=True)
    shifts = [None] * len(target) if zeros is None else zeros.unbind()
    for after, ((goal, step, code, change, U_j), zero) in enumerate(zip(rows, shifts, strict=True), 1):
        grid.clamp_(torch.round(grid.position(goal / step), out=code), zero)
        change.sub_((grid.points(code) * step).bfloat16())  # as readers will hold it
        target[after:].addr_(U_j[after:], change)
    return codes


def _halves(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """The order of a sweep: each range half by half, and between its halves ``(start, middle, stop)``.

    There, what the first half moved reaches the targets of the second in one product. Only inside a short range, which
    is its own first half, does it go from input to input.
    """
    if stop - start <= _RANGE:
        yield start, stop, stop
        return
    middle = start + max(_RANGE, (stop - start) // (2 * _RANGE) * _RANGE)
    yield from _halves(start, middle)
    yield start, middle, stop
    yield from _halves(middle, stop)
