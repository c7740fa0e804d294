"""Weights, moments and the plain float64 answers that the solver is held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from srr_dist.solve import AsymmetricIntGrid, Grid, IntGrid, Metric, MXIntGrid, NF4Grid
from srr_dist.solve.grids import PER_CHANNEL

T = TypeVar("T")

MOMENTS = ("white", "decaying", "diagonal", "singular", "wide", "massive")
SHAPES = ((48, 64), (64, 48), (160, 32), (32, 160), (1, 64), (96, 96))
GRIDS = [
    MXIntGrid(3, 16), IntGrid(3, 16), IntGrid(2, 8), MXIntGrid(4, 32), IntGrid(4, PER_CHANNEL),
    AsymmetricIntGrid(3, 16), AsymmetricIntGrid(2, 8), AsymmetricIntGrid(8, PER_CHANNEL), NF4Grid(4, 32),
]  # fmt: skip
CORRELATED = ["decaying", "singular", "massive", "wide"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(m: int, n: int, seed: int = 0) -> Tensor:
    """Noise and a low-rank part with a decaying spectrum: float32 ``[m, n]``."""
    decay = torch.arange(1, 17, dtype=torch.float64) ** -0.5
    return (
        0.02 * (normal(m, n, seed=seed) + (normal(m, 16, seed=seed + 1) * decay) @ normal(16, n, seed=seed + 2))
    ).float()


def moment(kind: str, n: int, seed: int = 0) -> Tensor:
    """A moment float64 ``[n, n]`` (``[n]`` for ``diagonal``, ``[2, n / 2, n / 2]`` for ``banded``)."""
    basis = torch.linalg.qr(normal(n, n, seed=seed + 7))[0]
    decaying = (basis * torch.logspace(1, -3, n, dtype=torch.float64)) @ basis.mT
    match kind:
        case "white":
            H = torch.eye(n, dtype=torch.float64)
        case "decaying":
            H = decaying
        case "banded":
            half = n // 2
            return torch.stack((decaying[:half, :half], 3.0 * decaying[half:, half:]))
        case "diagonal":
            return torch.logspace(2, -2, n, dtype=torch.float64)
        case "singular":
            x = normal(max(n // 3, 1), n, seed=seed + 8)
            H = x.mT @ x
        case "wide":  # eigenvalues over eight decades
            H = (basis * torch.logspace(4, -4, n, dtype=torch.float64)) @ basis.mT
        case "massive":  # two channels hold all but 1e-5 of the energy
            direction = 1e-3 * normal(2, n, seed=seed + 9)
            direction[0, 3], direction[1, n // 2] = 1.0, 0.5
            H = decaying + 1e5 * direction.mT @ direction
        case _:
            raise ValueError(kind)
    return (H + H.mT) / 2


def full(H: Tensor) -> Tensor:
    if H.dim() == 3:
        return torch.block_diag(*H)
    return H.diag() if H.dim() == 1 else H


def two_sided(shape: tuple[int, int], outputs: str = "decaying", inputs: str = "decaying") -> Metric:
    """The metric of an ``[m, n]`` layer by both of its moments."""
    m, n = shape
    return Metric.of(moment(inputs, n)).beside(Metric.of(moment(outputs, m, seed=5)))


def sides(metric: Metric) -> tuple[Tensor, Tensor]:
    """``H_O``, damped, and ``H_I`` as the objective has them, float64."""
    assert metric.outputs is not None
    H_O = full(metric.outputs.H.double())
    H_O = H_O + metric.outputs.damping * torch.eye(len(H_O), dtype=torch.float64)
    return metric.unit * H_O, full(metric.H.double())


def weighed(E: Tensor, metric: Metric) -> float:
    """``tr(H_O E H_I Eᵀ)`` by its definition, in float64."""
    H_O, H_I = sides(metric)
    return float(torch.trace(H_O @ E.double() @ H_I @ E.double().mT))


def own(grid: Grid, W: Tensor) -> tuple[Tensor, Tensor | None]:
    """The grid's own scales and zero points."""
    return next(grid.candidates(W))


def bounds(grid: Grid, zero: Tensor | None, W: Tensor, scale: Tensor) -> list[Tensor]:
    """Smallest and largest code at every place of W, float64."""
    zeros = (torch.zeros(scale.shape) if zero is None else zero).double()
    return [end - zeros.repeat_interleave(W.shape[1] // scale.shape[1], dim=1) for end in grid.code_range]


def objective(delta: Tensor, H: Tensor) -> float:
    """``tr(Δ H Δᵀ)`` by its definition, in float64."""
    return float(torch.trace(delta.double() @ full(H).double() @ delta.double().mT))


def singular_values(E: Tensor, H: Tensor) -> Tensor:
    """Of ``E S`` with S the symmetric root from an eigendecomposition, by a full SVD in float64."""
    values, V = torch.linalg.eigh(full(H).double())
    S = (V * values.clamp_min(0.0).sqrt()) @ V.mT
    return torch.linalg.svdvals(E.double() @ S)


def best_objective(E: Tensor, H: Tensor, rank: int) -> float:
    """``min ‖E − L R‖²_H`` over rank ``rank``, by Eckart and Young."""
    return float(singular_values(E, H)[rank:].square().sum())


def with_threads(threads: int, function: Callable[[], T]) -> T:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


def second_order(delta: Tensor, gradients: Iterable[Tensor]) -> float:
    """``mean_s ⟨Δ, G_s⟩²`` over the gradients that are finite."""
    along = [float((delta * G).sum(-1, dtype=torch.float64).sum()) for G in gradients]
    squares = [slope**2 for slope in along if math.isfinite(slope)]
    return sum(squares) / len(squares) if squares else math.nan
