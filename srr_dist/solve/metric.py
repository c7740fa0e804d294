"""The metric of a layer: every product with H, and the sums in float64 where they decide.

``tr(E H Eᵀ)`` weighs errors by the moment of the layer's inputs. With a moment ``H_O: [m, m]`` of its outputs beside
it the error is ``tr(H_O E H Eᵀ)`` (YAQA, arXiv 2505.22988; there both come from gradients of the network's own loss).
For ``H_O = C Cᵀ`` it is that of ``Cᵀ E`` in the metric of the inputs, so that whatever is known of one side holds for
both once rows are whitened: the best ``L R`` for E has ``Cᵀ L R`` best for ``Cᵀ E``. ``H_O`` of many outputs may be
known in bands alone, blocks along its diagonal: each then has a root, and a feedback, of its own.

Thin factorizations and float64 products with a small result run on one thread: they split their sums by the thread
count and change their last bits with it, and results must not depend on how many cores a worker was given. Wide
float32 products do not (``lowrank.block_size`` keeps them wide).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from srr_dist.solve.rounding import DAMPING, Feedback, feedback_of
from srr_dist.threads import one_thread


@dataclass(frozen=True)
class Metric:
    """``‖E‖²_H = tr(E H Eᵀ)`` for a moment H that may be full or diagonal, or ``tr(H_O E H Eᵀ)`` with an output side.

    Attributes:
        H: float32 ``[n, n]`` or, when diagonal, ``[n]``, of an output side also ``[bands, b, b]``; scaled so that its
            mean diagonal is 1.
        unit: what one unit of the scaled metric is worth, so that ``unit · tr(E H Eᵀ)`` is ``E‖x Eᵀ‖²``.
        outputs: the output side, a metric of m outputs with ``H_O`` in the place of H; None where all count alike. It
            is used damped as for feedback, throughout and not for rounding alone, since its root is inverted.
    """

    H: Tensor
    unit: float = 1.0
    outputs: Metric | None = None
    directions: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Starting directions by their number, kept for all layers that share the input: ``lowrank.start_directions``."""

    @staticmethod
    def of(moment: Tensor, shrinkage: float = 0.0) -> Metric:
        """The metric of a moment, of any float type and a shape of H. A moment of zeros gives the identity.

        An input that no calibration token reached (a dead expert) says nothing of which error matters, so that all
        directions count alike, with unit 0. ``shrinkage`` adds that share of the mean diagonal to the diagonal: errors
        of earlier layers reach directions which the original inputs hardly touch.
        """
        diagonal = diagonal_of(moment)
        mean = float(diagonal.double().mean())
        if mean <= 0.0:
            return Metric(torch.ones(diagonal.numel(), device=moment.device), 0.0)
        H = torch.empty(moment.shape, dtype=torch.float32, device=moment.device)
        for part, of in zip(*(each.reshape(-1, each.shape[-1]).split(_STRIP) for each in (H, moment)), strict=True):
            torch.div(of, mean, out=part)
        diagonal_of(H).add_(shrinkage)
        return Metric(H, mean)

    def beside(self, outputs: Metric) -> Metric:
        """The same of the inputs, with an output side."""
        return replace(self, unit=self.unit * outputs.unit, outputs=outputs)

    @cached_property
    def inputs(self) -> Metric:
        """The same without an output side: what whitened rows are measured in."""
        return self if self.outputs is None else replace(self, outputs=None)

    @property
    def diagonal(self) -> bool:
        """Whether H is stored as its diagonal."""
        return self.H.dim() == 1

    @property
    def weights(self) -> Tensor:
        """The diagonal of H, ``[n]``."""
        return diagonal_of(self.H).flatten()

    @cached_property
    def bands(self) -> tuple[Metric, ...]:
        """One metric for each band of consecutive outputs, in the same units; itself where there is one block alone."""
        return tuple(Metric(H, self.unit) for H in self.H) if self.H.dim() == 3 else (self,)

    def by_band(self, of: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """``of`` each band of an output side and its part of some rows ``[m, ...]``, one below the other."""
        if len(self.bands) == 1:
            return of(self, *rows)
        parts = zip(self.bands, *(each.chunk(len(self.bands)) for each in rows), strict=True)
        return torch.cat([of(*part) for part in parts])

    @property
    def separate(self) -> bool:
        """Whether errors of different outputs cannot make up for each other, so that every row is by itself."""
        return self.outputs is None or self.outputs.diagonal

    @cached_property
    def feedback(self) -> Feedback:
        """What rounding with error feedback takes from H; found once for all layers that share the input."""
        with one_thread():
            return feedback_of(self.H)

    @property
    def damping(self) -> float:
        """What is added to the diagonal where H is used damped, as a share of its mean; in bands, the most."""
        if len(self.bands) > 1:
            return max(band.damping for band in self.bands)
        return DAMPING if self.diagonal else self.feedback.damping

    def beyond(self, R: Tensor) -> Metric:
        """The metric of what no adapter with rows ``R: [r, n]`` makes up for: ``‖E‖² = min_X ‖E − X R‖²_H``.

        ``H − H Rᵀ (R H Rᵀ)⁻¹ R H`` of a full H, in float64: a few massive inputs may be all that is taken away. The
        best X, ``E H Rᵀ (R H Rᵀ)⁻¹``, is the same for every output side, which stays what it is.
        """
        HR = self.left(R.mT)
        values, V = eigh(gram(R.mT, HR))
        V = V * torch.where(values > _RANK_SHARE * values[0], values, torch.inf).rsqrt()
        rest = self.H.double()
        with one_thread():
            blocks = rest.view(-1, *rest.shape[-2:])
            for block, taken in zip(blocks, (HR.double() @ V).chunk(len(blocks)), strict=True):
                block.addmm_(taken, taken.mT, alpha=-1.0)
        diagonal_of(rest).clamp_(min=0.0)
        metric = Metric.of(rest)
        return replace(metric, unit=metric.unit * self.unit, outputs=self.outputs)

    def whitened(self, E: Tensor) -> Tensor:
        """``Cᵀ E: [m, b]`` in float32, rows in the order of the output side's feedback; E itself without one."""
        return E if self.outputs is None else self.outputs.by_band(Metric._rooted, E)

    def unwhitened(self, U: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        """L and R of ``U R``, an approximation of whitened rows, with columns of length 1 in L, in float64 on the way.

        Args:
            U: float32 ``[m, r]``, of length 1 in whitened rows.
            R: float32 ``[r, n]``.
        """
        if self.outputs is None:
            return U, R
        L = self.outputs.by_band(Metric._unrooted, U.double())
        lengths = L.norm(dim=0)
        return (L / lengths).float(), (R.double() * lengths.unsqueeze(1)).float()

    def _rooted(self, X: Tensor) -> Tensor:
        """``Cᵀ X`` of this H, in one block, in the order of its feedback."""
        if self.diagonal:
            return X * (self.H + DAMPING).sqrt().unsqueeze(1)
        with one_thread() if X.shape[1] < _THIN else nullcontext():
            mixed: Tensor = self.feedback.U.mT @ X[self.feedback.order]
        return mixed.mul_(self.feedback.D.sqrt().unsqueeze(1))

    def _unrooted(self, X: Tensor) -> Tensor:
        """``C⁻ᵀ X`` of this H, float64."""
        if self.diagonal:
            return X / (self.H + DAMPING).double().sqrt().unsqueeze(1)
        L, lengths = torch.empty_like(X), self.feedback.D.double().sqrt().unsqueeze(1)
        with one_thread():
            L[self.feedback.order] = torch.linalg.solve_triangular(
                self.feedback.U.double().mT, X / lengths, upper=False, unitriangular=True
            )
        return L

    def right(self, E: Tensor) -> Tensor:
        """``E H: [m, n]``."""
        return E * self.H if self.diagonal else E @ self.H

    @property
    def damped(self) -> Tensor:
        """H damped as for feedback, ``[n, n]`` of a full one."""
        H = self.H.clone()
        H.diagonal().add_(self.damping)
        return H

    def both(self, E: Tensor) -> Tensor:
        """``H_O E H: [m, n]``; ``E H`` without an output side."""
        across = self.right(E)
        return across if self.outputs is None else self.outputs.by_band(Metric._damped_left, across)

    def left(self, X: Tensor) -> Tensor:
        """``H X`` for ``X: [n, b]``."""
        if len(self.bands) > 1:
            return self.by_band(Metric.left, X)
        return self.H[:, None] * X if self.diagonal else self.H @ X

    def _damped_left(self, X: Tensor) -> Tensor:
        return self.left(X).add_(X, alpha=self.damping)

    def energy(self, E: Tensor) -> float:
        """``‖E‖²_H = tr(E H Eᵀ)`` of ``E: [m, n]``, float32 products added up in float64.

        H is symmetric, so that each pair of inputs is taken once: about half of the product ``E H``.
        """
        E = self.whitened(E)
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
        E, L, HR = self.whitened(E), self.whitened(L), self.left(R.mT)
        rest = energy - 2.0 * inner(E @ HR, L) + float((gram(L, L) * gram(R.mT, HR)).sum())
        return rest if rest > CANCELLATION * energy else self.inputs.energy(less(E, L, R))


CANCELLATION = 0.01
"""Share of an energy below which a difference of float32 energies has too few digits left (their own error: 1e-7)."""


_THIN = 256
"""Columns below which a product with the output side's root is left to one thread."""

_RANK_SHARE = 1e-10
"""Share of the largest eigenvalue of ``R H Rᵀ`` below which R has nothing in a direction."""


_STRIP = 512
"""Rows of a float64 moment that become float32 at once: a CPU divides them in float64 first, in memory of their own."""


def diagonal_of(H: Tensor) -> Tensor:
    """A view of the diagonal, ``[n]`` or ``[bands, b]``."""
    return H if H.dim() == 1 else H.diagonal(dim1=-2, dim2=-1)


def less(E: Tensor, L: Tensor, R: Tensor) -> Tensor:
    """``E − L R``, in the memory of the product."""
    product = L @ R
    return torch.sub(E, product, out=product)


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
