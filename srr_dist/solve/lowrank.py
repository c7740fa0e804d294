"""The best rank-r approximation in the H-norm, with no root, no inverse and no full SVD.

With ``M = E H Eᵀ: [m, m]`` and ``U_r`` its r leading orthonormal eigenvectors, the minimiser of ``‖E − L R‖_H`` is
``L R = U_r (U_rᵀ E)``: from ``E S = U Σ Vᵀ`` its best rank-r approximation is ``U_r U_rᵀ E S``, and S cancels.
M is never formed. A block of vectors is multiplied by it, ``M Y = E (H (Eᵀ Y))``, and the blocks are kept: the leading
Ritz vectors of the block Krylov space ``[Y, M Y, M² Y, …]`` (Golub and Underwood, 1977; Musco and Musco, arXiv
1504.05477). It grows until the energy still to be captured is small beside the energy left over. What H favours E
favours too, so that it begins with E's image of the leading directions of H, found once for all layers that share an
input. Nothing is inverted, so a singular H needs no damping, and float32 products do; thin parts are float64.

Published codes take a float64 square root of H, a full SVD of E S and a solve with S instead
(QERA, arXiv 2410.06040; SRR, arXiv 2602.02001).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from srr_dist.solve.metric import CANCELLATION, Metric, eigh, gram, less
from srr_dist.threads import one_thread

OVERSAMPLING = 16
TOLERANCE = 2e-4
MAX_STEPS = 10
START_STEPS = 3
"""Steps for the leading directions of H: a start needs no digits."""


@dataclass(frozen=True)
class Subspace:
    """The leading left singular directions of ``E S``, strongest first.

    Attributes:
        U: float32 ``[m, rank]``, orthonormal.
        R: float32 ``[rank, n]``, ``Uᵀ E``, so that ``U R`` is the best approximation.
        energies: float64 ``[rank]``, the squared singular values ``σ_i²``.
        tail: ``‖E − U R‖²_H``, the energy beyond them, in the scaled metric.
        steps: products with M that it took.
    """

    U: Tensor
    R: Tensor
    energies: Tensor
    tail: float
    steps: int

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
    directions: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> Subspace:
    """The ``rank`` leading left singular directions of ``E S``.

    Args:
        E: float32 ``[m, n]``.
        metric: H of the n inputs.
        rank: directions wanted, 0 … min(m, n).
        directions: float32 ``[n, b]`` with rank ≤ b ≤ m, inputs whose image under E is where the search begins.
        tolerance: stop when the captured energy that is still expected falls below this share of the residual energy.
        max_steps: stop anyway.
    """
    total = metric.energy(E)
    if rank == 0:
        return Subspace(E[:, :0], E[:0], E.new_zeros(0, dtype=torch.float64), max(total, 0.0), 0)
    found = _leading_eigenvectors(
        lambda Y: E @ metric.left(E.mT @ Y), E @ directions, rank, total, tolerance, max_steps
    )
    # Multiplied as wide as the block, see block_size.
    R, energies = (found.U.mT @ E)[:rank], found.values[:rank].clamp_min(0.0)
    U, tail = found.U[:, :rank], total - float(energies.sum())
    if tail < CANCELLATION * total:  # a few massive inputs may hold all but 1e-6 of the total
        tail = max(metric.energy(less(E, U, R)), 0.0)
    return Subspace(U, R, energies, tail, found.steps)


def start_directions(metric: Metric, count: int) -> Tensor:
    """About the ``count`` leading eigenvectors of H times their eigenvalues, and some of every other: ``[n, count]``.

    An image of them under E lies close to the leading left singular directions of ``E S`` where E has no structure of
    its own; the random part reaches those of an E that has. The numbers are the same for every metric of n inputs.
    """
    if count not in metric.directions:
        n = metric.H.shape[0]
        probe = metric.left(uniform((n, count), torch.Generator().manual_seed(n), metric.H.device))
        trace = float(metric.H.double().sum() if metric.diagonal else metric.H.diagonal().double().sum())
        found = _leading_eigenvectors(metric.left, probe, count, trace, 0.0, START_STEPS)
        metric.directions[count] = found.U * found.values.float() + probe / n
    return metric.directions[count]


def uniform(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Entries uniform on [−1, 1], float32, drawn on the CPU so that every device sees the same numbers."""
    return torch.rand(shape, generator=generator).mul_(2.0).sub_(1.0).to(device)


@dataclass(frozen=True)
class _Eigenvectors:
    """As many as the block is wide: float32 ``[m, b]``; their Ritz values, float64 ``[b]``, descending; the steps."""

    U: Tensor
    values: Tensor
    steps: int


def _leading_eigenvectors(
    product: Callable[[Tensor], Tensor], start: Tensor, count: int, trace: float, tolerance: float, max_steps: int
) -> _Eigenvectors:
    """Ritz vectors of a symmetric matrix over the block Krylov space of ``start: [m, b]``, float32.

    Stops when the sum of the ``count`` leading values is expected to grow by less than ``tolerance`` of what it leaves
    of the trace (extrapolated from the last two steps), when the space is full, or after ``max_steps``.
    """
    m, b = start.shape
    block, basis = orthonormal(start), start[:, :0].double()
    T = basis[:0]
    captured, gain = 0.0, trace
    for step in range(1, max_steps + 1):
        image = product(block.float())
        basis = torch.cat((basis, block), dim=1)
        T = _bordered(T, gram(basis, image))
        values, V = eigh(T)
        previous, captured = captured, float(values[:count].clamp_min(0.0).sum())
        previous_gain, gain = gain, captured - previous
        rate = min(max(gain / previous_gain, 0.0), 0.95) if previous_gain > 0.0 else 0.0
        converged = step > 2 and gain * rate / (1.0 - rate) <= tolerance * max(trace - captured, 1e-6 * trace)
        free = m - basis.shape[1]
        if converged or not free:
            break
        if step < max_steps:
            block = orthonormal(image[:, :free], basis)
    with one_thread():
        U: Tensor = (basis @ V[:, :b]).float()
    return _Eigenvectors(U, values[:b], step)


def _bordered(T: Tensor, border: Tensor) -> Tensor:
    """``Bᵀ M B`` of a basis with a block more: T ``[p, p]`` and the border ``[p + b, b]``."""
    p = T.shape[0]
    return torch.cat((torch.cat((T, border[:p].mT)), border), dim=1)


def orthonormal(Y: Tensor, basis: Tensor | None = None) -> Tensor:
    """An orthonormal basis, float64 ``[m, b]``, whose first i columns span the first i of ``Y: [m, b]``, in order.

    With an orthonormal ``basis`` (float64 ``[m, p]``, p + b ≤ m): of what ``Y`` has beyond it. Where a column depends
    on those before it, an arbitrary direction takes its place. Householder reflections keep what is left of a weak
    column under a strong one (a Gram matrix would square their ratio, and massive inputs make it 1e4 and more), and one
    thread keeps the bits.
    """
    U: Tensor = Y.double()
    with one_thread():
        if basis is None:
            U = torch.linalg.qr(U)[0]
        else:
            for _ in range(2):  # once more, since what little is left of a column may lie in the basis again
                U = torch.linalg.qr(U - basis @ (basis.mT @ U))[0]
    return U


def principal(L: Tensor, R: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
    """``L R`` again, with orthonormal columns in L, strongest first, and the squared singular values of ``L R S``.

    Args:
        L: float32 ``[m, r]``, r ≤ m.
        R: float32 ``[r, n]``.
        metric: H of the n inputs.
    """
    U = orthonormal(L).float()
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
