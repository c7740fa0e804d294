"""The solver, in pure torch: grids, rounding, low rank in a metric, the choice of k, and one layer put together.

Notation, in the papers' letters: a linear layer is ``y = x Wᵀ`` with ``W: [m, n]`` (m = out, n = in).
``H = E[x xᵀ]: [n, n]`` is the input moment, ``S`` any factor with ``S Sᵀ = H``. ``Q`` is the quantized weight,
``L: [m, r]`` and ``R: [r, n]`` the adapter, ``Ŵ = Q + L R`` and ``Δ = W − Ŵ``. The error of a layer is
``E‖x Δᵀ‖² = tr(Δ H Δᵀ) = ‖Δ S‖²_F``, called the objective; with a moment ``H_O: [m, m]`` of the layer's outputs it is
``tr(H_O Δ H Δᵀ)``.
"""

from srr_dist.solve.allocation import allocate, width_errors
from srr_dist.solve.curvature import (
    ONE_SIDED,
    TWO_SIDED,
    gate,
    kronecker_cosine,
    sketch_metric,
)
from srr_dist.solve.grids import AsymmetricIntGrid, Grid, IntGrid, MXIntGrid, NF4Grid, make_grid
from srr_dist.solve.layer import LayerSolution, Stored, remeasured, solve_layer
from srr_dist.solve.metric import Metric
from srr_dist.solve.problem import SolveOptions
from srr_dist.solve.quantizer import Quantizer
from srr_dist.solve.tuning import BlockError, Tuned, TuneOptions, tune

__all__ = [
    "ONE_SIDED",
    "TWO_SIDED",
    "AsymmetricIntGrid",
    "BlockError",
    "Grid",
    "IntGrid",
    "LayerSolution",
    "MXIntGrid",
    "Metric",
    "NF4Grid",
    "Quantizer",
    "SolveOptions",
    "Stored",
    "TuneOptions",
    "Tuned",
    "allocate",
    "gate",
    "kronecker_cosine",
    "make_grid",
    "remeasured",
    "sketch_metric",
    "solve_layer",
    "tune",
    "width_errors",
]
