"""The best rank-r approximation in the H-norm, with no root, no inverse and no full SVD.

With ``M = E H Eᵀ: [m, m]`` and ``U_r`` its r leading orthonormal eigenvectors, the minimiser of ``‖E − L R‖_H`` is
``L R = U_r (U_rᵀ E)``: from ``E S = U Σ Vᵀ`` its best rank-r approximation is ``U_r U_rᵀ E S``, and S cancels.
M is never formed. A block of vectors is multiplied by it, ``M Y = (E H)(Eᵀ Y)``, rotated to its Ritz vectors and
made orthonormal again, until the energy still to be captured is small beside the energy left over. Nothing is
inverted, so a singular H needs no damping, and float32 products do; the b×b parts are float64.

Published codes take a float64 square root of H, a full SVD of E S and a solve with S instead
(QERA, arXiv 2410.06040; SRR, arXiv 2602.02001).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srr_dist.solve.metric import Metric, eigh, gram, inner, one_thread

OVERSAMPLING = 16
TOLERANCE = 1e-4
MAX_ITERATIONS = 24


@dataclass(frozen=True)
class Subspace:
    """The leading left singular directions of ``E S``, strongest first.

    Attributes:
        U: float32 ``[m, rank]``, orthonormal.
        R: float32 ``[rank, n]``, ``Uᵀ E``, so that ``U R`` is the best approximation.
        energies: float64 ``[rank]``, the squared singular values ``σ_i²``.
        tail: ``‖E − U R‖²_H``, the energy beyond them, in the scaled metric.
        iterations: products with M that it took.
    """

    U: Tensor
    R: Tensor
    energies: Tensor
    tail: float
    iterations: int

    @property
    def total(self) -> float:
        """``‖E S‖²_F = tr(E H Eᵀ)``, in the scaled metric."""
        return self.residual(0)

    def residual(self, rank: int) -> float:
        """``‖E − L R‖²_H`` of the best approximation of that rank, 0 … the rank of the subspace."""
        return self.tail + float(self.energies[rank:].sum())

    def unexplained(self, rank: int) -> float:
        """``ρ_rank = 1 − Σ_{i≤rank} σ_i² / ‖E S‖²``, the share of the energy beyond that rank."""
        return self.residual(rank) / self.total if self.total > 0.0 else 0.0


def leading_subspace(
    E: Tensor,
    metric: Metric,
    rank: int,
    start: Tensor,
    *,
    EH: Tensor | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Subspace:
    """The ``rank`` leading left singular directions of ``E S`` by block subspace iteration.

    Args:
        E: float32 ``[m, n]``.
        metric: H of the n inputs.
        rank: directions wanted, 0 … min(m, n).
        start: float32 ``[m, b]`` with rank ≤ b ≤ m, any vectors that are not orthogonal to the answer.
        EH: ``E H`` when the caller has it already.
        tolerance: stop when the captured energy that is still expected, extrapolated from the last two steps, falls
            below this share of the residual energy.
        max_iterations: stop anyway.
    """
    EH = metric.right(E) if EH is None else EH
    total = inner(EH, E)
    if rank == 0:
        return Subspace(E[:, :0], E[:0], E.new_zeros(0, dtype=torch.float64), max(total, 0.0), 0)
    Y, captured, gain = start, 0.0, total
    for iteration in range(1, max_iterations + 1):
        U = orthonormal(Y)
        Z = EH @ (U.mT @ E).mT
        energies, V = eigh(gram(U, Z))
        Y = Z @ V.float()
        previous_gain, previous = gain, captured
        captured = float(energies[:rank].clamp_min(0.0).sum())
        gain = captured - previous
        rate = min(max(gain / previous_gain, 0.0), 0.95) if previous_gain > 0.0 else 0.0
        if iteration > 2 and gain * rate / (1.0 - rate) <= tolerance * max(total - captured, 1e-6 * total):
            break
    U = (U.double() @ V).float()
    R, UEH = (U.mT @ E)[:rank], (U.mT @ EH)[:rank]  # as wide as the block: see block_size
    U = U[:, :rank]
    # Measured on what is left, not as total − captured: a few massive inputs may hold all but 1e-6 of the total.
    tail = inner(EH - U @ UEH, E - U @ R)
    return Subspace(U, R, energies[:rank].clamp_min(0.0), max(tail, 0.0), iteration)


def orthonormal(Y: Tensor) -> Tensor:
    """An orthonormal basis ``[m, b]`` whose first i columns span the first i of ``Y: [m, b]``, in order; b ≤ m.

    Where a column depends on those before it, an arbitrary direction takes its place. Householder reflections keep
    what is left of a weak column under a strong one (a Gram matrix would square their ratio, and massive inputs make
    it 1e4 and more), and one thread keeps the bits.
    """
    with one_thread():
        U: Tensor = torch.linalg.qr(Y.double())[0]
    return U.float()


def principal(L: Tensor, R: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """``L R`` again, with orthonormal columns in L, strongest first, and the squared singular values of ``L R S``.

    Args:
        L: float32 ``[m, r]``, r ≤ m.
        R: float32 ``[r, n]``.
        metric: H of the n inputs.
    """
    U = orthonormal(L)
    B = gram(U, L).float() @ R
    with one_thread():
        BH = metric.right(B)
    energies, V = eigh(gram(BH.mT, B.mT))
    return U @ V.float(), V.mT.float() @ B, energies.clamp_min(0.0)


def block_size(m: int, n: int, rank: int) -> int:
    """Vectors to iterate on for ``rank`` directions of an ``[m, n]`` matrix.

    A multiple of 16: at such widths float32 products add up in the same order for any thread count.
    """
    return min(-(-(rank + OVERSAMPLING) // 16) * 16, m, n)


def refit(L_stored: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """``argmin_X ‖L R − L_stored X‖``: float32 ``[r, n]``; directions that L_stored lacks give zeros.

    The answer, ``(L_storedᵀ L_stored)⁻¹ L_storedᵀ L R``, is the same in every metric of the inputs.
    """
    if L.shape[1] == 0:
        return R
    values, V = eigh(gram(L_stored, L_stored))
    inverse = torch.where(values > 1e-12 * values[0], 1.0 / values, 0.0)
    mixing = ((V * inverse) @ V.mT) @ gram(L_stored, L)
    return mixing.float() @ R
