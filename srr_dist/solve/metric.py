"""The metric of a layer's inputs: every product with H, and the sums in float64 where they decide.

Thin factorizations and float64 products with a small result run on one thread: they split their sums by the thread
count and change their last bits with it, and results must not depend on how many cores a worker was given. Wide
float32 products do not (``lowrank.block_size`` keeps them wide).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from srr_dist.solve.rounding import Feedback, feedback_of
from srr_dist.threads import one_thread


@dataclass(frozen=True)
class Metric:
    """``‖E‖²_H = tr(E H Eᵀ)`` for a moment H that may be full or diagonal.

    Attributes:
        H: float32 ``[n, n]`` or, when diagonal, ``[n]``; scaled so that its mean diagonal is 1.
        unit: what one unit of the scaled metric is worth, so that ``unit · tr(E H Eᵀ)`` is ``E‖x Eᵀ‖²``.
    """

    H: Tensor
    unit: float = 1.0
    directions: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Starting directions by their number, kept for all layers that share the input: ``lowrank.start_directions``."""

    @staticmethod
    def of(moment: Tensor, shrinkage: float = 0.0) -> Metric:
        """The metric of a moment ``[n, n]`` or ``[n]`` (any float type). A moment of zeros gives the identity.

        An input that no calibration token reached (a dead expert) says nothing of which error matters, so that all
        directions count alike, with unit 0. ``shrinkage`` adds that share of the mean diagonal to the diagonal: errors
        of earlier layers reach directions which the original inputs hardly touch.
        """
        diagonal = moment.diagonal() if moment.dim() == 2 else moment
        mean = float(diagonal.double().mean())
        if mean <= 0.0:
            return Metric(torch.ones(moment.shape[0], device=moment.device), 0.0)
        H = torch.empty(moment.shape, dtype=torch.float32, device=moment.device)
        torch.div(moment, mean, out=H)
        (H.diagonal() if H.dim() == 2 else H).add_(shrinkage)
        return Metric(H, mean)

    @property
    def diagonal(self) -> bool:
        """Whether H is stored as its diagonal."""
        return self.H.dim() == 1

    @property
    def weights(self) -> Tensor:
        """The diagonal of H, ``[n]``."""
        return self.H if self.diagonal else self.H.diagonal()

    @cached_property
    def feedback(self) -> Feedback:
        """What rounding with error feedback takes from a full H; found once for all layers that share the input."""
        with one_thread():
            return feedback_of(self.H)

    def beyond(self, R: Tensor) -> Metric:
        """The metric of what no adapter with rows ``R: [r, n]`` makes up for: ``‖E‖² = min_X ‖E − X R‖²_H``.

        ``H − H Rᵀ (R H Rᵀ)⁻¹ R H`` of a full H, in float64: a few massive inputs may be all that is taken away.
        """
        HR = self.left(R.mT)
        values, V = eigh(gram(R.mT, HR))
        V = V * torch.where(values > _RANK_SHARE * values[0], values, torch.inf).rsqrt()
        with one_thread():
            taken = HR.double() @ V
            rest = self.H.double().addmm_(taken, taken.mT, alpha=-1.0)
        rest.diagonal().clamp_(min=0.0)
        metric = Metric.of(rest)
        return replace(metric, unit=metric.unit * self.unit)

    def right(self, E: Tensor) -> Tensor:
        """``E H: [m, n]``."""
        return E * self.H if self.diagonal else E @ self.H

    def left(self, X: Tensor) -> Tensor:
        """``H X`` for ``X: [n, b]``."""
        return self.H[:, None] * X if self.diagonal else self.H @ X

    def energy(self, E: Tensor) -> float:
        """``‖E‖²_H = tr(E H Eᵀ)`` of ``E: [m, n]``, float32 products added up in float64.

        H is symmetric, so that each pair of inputs is taken once: about half of the product ``E H``.
        """
        if self.diagonal:
            return inner(self.right(E), E)
        n, total = E.shape[1], torch.zeros((), dtype=torch.float64)
        width = _panel(n)
        for start in range(0, n, width):
            panel = slice(start, min(start + width, n))
            # Twice the part above the diagonal block, so that the block itself counts once.
            product = torch.addmm(E[:, panel] @ self.H[panel, panel], E[:, :start], self.H[:start, panel], alpha=2.0)
            total += _total(product.mul_(E[:, panel]))
        return float(total)

    def remainder(self, E: Tensor, energy: float, L: Tensor, R: Tensor) -> float:
        """``‖E − L R‖²_H`` of ``L: [m, r]``, ``R: [r, n]``, given ``energy`` = ``‖E‖²_H``.

        From thin products; where they would cancel to less than ``CANCELLATION``, measured on ``E − L R`` itself.
        """
        HR = self.left(R.mT)
        rest = energy - 2.0 * inner(E @ HR, L) + float((gram(L, L) * gram(R.mT, HR)).sum())
        return rest if rest > CANCELLATION * energy else self.energy(E - L @ R)


CANCELLATION = 0.01
"""Share of an energy below which a difference of float32 energies has too few digits left (their own error: 1e-7)."""


_RANK_SHARE = 1e-10
"""Share of the largest eigenvalue of ``R H Rᵀ`` below which R has nothing in a direction."""


def _panel(n: int) -> int:
    """Columns that ``Metric.energy`` multiplies at once: some eight panels, each wide enough to run at full speed."""
    return max(128, -(-n // 128) * 16)


def _total(A: Tensor) -> Tensor:
    """The sum of a float32 matrix: short rows in float32, the rest in float64."""
    return A.sum(-1).double().cpu().sum()


def inner(A: Tensor, B: Tensor) -> float:
    """``Σ A∘B`` of two float32 matrices, added up in float64.

    Rows first, so that the order of the additions is the same for any thread count.
    """
    return float((A * B).sum(-1, dtype=torch.float64).cpu().sum())


def gram(A: Tensor, B: Tensor) -> Tensor:
    """``Aᵀ B: [a, b]`` in float64 of two tall float32 matrices, on one thread."""
    with one_thread():
        product: Tensor = A.mT.double() @ B.double()
    return product


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and eigenvectors of a small symmetric float64 matrix, on the CPU, one thread."""
    with one_thread():
        values, vectors = torch.linalg.eigh((A + A.mT).cpu() / 2)
    return values.flip(-1).to(A.device), vectors.flip(-1).to(A.device)
