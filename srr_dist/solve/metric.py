"""The metric of a layer's inputs: every product with H, and the sums in float64 where they decide.

Thin factorizations and float64 products with a small result run on one thread: they split their sums by the thread
count and change their last bits with it, and results must not depend on how many cores a worker was given. Wide
float32 products do not (``lowrank.block_size`` keeps them wide).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """``‖E‖²_H = tr(E H Eᵀ)`` for a moment H that may be full or diagonal.

    Attributes:
        H: float32 ``[n, n]`` or, when diagonal, ``[n]``; scaled so that its mean diagonal is 1.
        unit: what one unit of the scaled metric is worth, so that ``unit · tr(E H Eᵀ)`` is ``E‖x Eᵀ‖²``.
    """

    H: Tensor
    unit: float = 1.0

    @staticmethod
    def of(moment: Tensor) -> Metric:
        """The metric of a moment ``[n, n]`` or ``[n]`` (any float type). A moment of zeros gives the identity.

        An input that no calibration token reached (a dead expert) says nothing of which error matters, so that all
        directions count alike, with unit 0.
        """
        diagonal = moment.diagonal() if moment.dim() == 2 else moment
        mean = float(diagonal.double().mean())
        if mean <= 0.0:
            return Metric(torch.ones(moment.shape[0], device=moment.device), 0.0)
        H = torch.empty(moment.shape, dtype=torch.float32, device=moment.device)
        return Metric(torch.div(moment, mean, out=H), mean)

    @property
    def diagonal(self) -> bool:
        """Whether H is stored as its diagonal."""
        return self.H.dim() == 1

    def right(self, E: Tensor) -> Tensor:
        """``E H: [m, n]``."""
        return E * self.H if self.diagonal else E @ self.H


def inner(A: Tensor, B: Tensor) -> float:
    """``Σ A∘B`` of two float32 matrices, added up in float64.

    Rows first, so that the order of the additions is the same for any thread count.
    """
    return float((A * B).sum(-1, dtype=torch.float64).cpu().sum())


@contextmanager
def one_thread() -> Iterator[None]:
    """Run small factorizations on one CPU thread, so that their bits do not depend on the cores at hand."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
