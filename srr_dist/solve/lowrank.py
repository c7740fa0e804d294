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

from srr_dist.solve.metric import Metric, eigh, inner

OVERSAMPLING = 16
TOLERANCE = 1e-4
MAX_ITERATIONS = 24


@dataclass(frozen=True)
class Subspace:
    """The leading left singular directions of ``E S``, strongest first.

    Attributes:
        U: float32 ``[m, b]``, orthonormal; the first ``rank`` columns are converged, the others are guard vectors.
        energies: float64 ``[b]``, the squared singular values ``σ_i²``.
        total: ``‖E S‖²_F = tr(E H Eᵀ)``, in the scaled metric.
        iterations: products with M that it took.
    """

    U: Tensor
    energies: Tensor
    total: float
    iterations: int

    def residual(self, rank: int) -> float:
        """``‖E − L R‖²_H`` of the best approximation of that rank: the total less the captured energy."""
        return max(self.total - float(self.energies[:rank].sum()), 0.0)

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
        start: float32 ``[m, b]`` with b ≥ rank, any vectors that are not orthogonal to the answer.
        EH: ``E H`` when the caller has it already.
        tolerance: stop when the captured energy that is still expected, extrapolated from the last two steps, falls
            below this share of the residual energy.
        max_iterations: stop anyway.
    """
    EH = metric.right(E) if EH is None else EH
    total = inner(EH, E)
    if rank == 0 or total <= 0.0:
        U = orthonormal(start)
        return Subspace(U, torch.zeros(U.shape[1], dtype=torch.float64, device=E.device), max(total, 0.0), 0)
    Y, captured, gain = start, 0.0, total
    for iteration in range(1, max_iterations + 1):
        U = orthonormal(Y)
        Z = EH @ (U.mT @ E).mT
        energies, V = eigh(U.mT.double() @ Z.double())
        V32 = V.float()
        Y = Z @ V32
        previous_gain, previous = gain, captured
        captured = float(energies[:rank].clamp_min(0.0).sum())
        gain = captured - previous
        rate = min(max(gain / previous_gain, 0.0), 0.95) if previous_gain > 0.0 else 0.0
        if iteration > 2 and gain * rate / (1.0 - rate) <= tolerance * max(total - captured, 1e-6 * total):
            break
    return Subspace(U @ V32, energies.clamp_min(0.0), total, iteration)


def orthonormal(Y: Tensor) -> Tensor:
    """An orthonormal basis ``[m, b']`` of the columns of ``Y: [m, b]``; b' < b where columns depend on each other.

    Columns are scaled to length one first: after a product with M they are nearly orthogonal Ritz vectors whose
    lengths differ by orders of magnitude, and so the Gram matrix is close to the identity.
    """
    Y64 = Y.double()
    Y64 = Y64 / torch.linalg.vector_norm(Y64, dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    values, V = eigh(Y64.mT @ Y64)
    keep = int((values > 1e-9 * values[0]).sum())
    U: Tensor = (Y64 @ V[:, :keep]) / values[:keep].sqrt()
    return U.float()


def block_size(m: int, n: int, rank: int) -> int:
    """Vectors to iterate on for ``rank`` directions of an ``[m, n]`` matrix."""
    return min(rank + OVERSAMPLING, m, n)


def refit(L_stored: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """``argmin_X ‖L R − L_stored X‖``: float32 ``[r, n]``; directions that L_stored lacks give zeros.

    The answer, ``(L_storedᵀ L_stored)⁻¹ L_storedᵀ L R``, is the same in every metric of the inputs.
    """
    if L.shape[1] == 0:
        return R
    values, V = eigh(L_stored.mT.double() @ L_stored.double())
    inverse = torch.where(values > 1e-12 * values[0], 1.0 / values, 0.0)
    mixing = ((V * inverse) @ V.mT) @ (L_stored.mT.double() @ L.double())
    return mixing.float() @ R
