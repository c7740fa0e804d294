"""The split k: how many of the r ranks preserve the weight before it is quantized.

SRR (arXiv 2602.02001) preserves the k leading directions ``P_k`` of the weight in the metric, quantizes the rest,
``Q = quant(W − P_k)``, and spends the other ranks on the error. k = 0 is QER (QERA, LQER, EoRA), k = r is
structure-first (LQ-LoRA, SVDQuant).
"""

from __future__ import annotations

import torch
from torch import Tensor

from srr_dist.solve.lowrank import Subspace, leading_subspace, uniform
from srr_dist.solve.metric import Metric


def random_subspace(m: int, metric: Metric, rank: int, directions: Tensor, seed: int) -> Subspace:
    """The spectrum of ``N S`` for a random ``N: [m, n]``: what an error without structure looks like in the metric."""
    N = uniform((m, directions.shape[0]), torch.Generator().manual_seed(seed), directions.device)
    return leading_subspace(metric.whitened(N), metric.inputs, rank, directions)


def criterion_split(weight: Subspace, noise: Subspace, rank: int) -> int:
    """The paper's k: ``argmin_k ρ_k(W S) · ρ_{r−k}(N S)``, ties to the smaller k.

    The first factor is the energy that is still exposed to quantization, the second the error that the other r − k
    ranks cannot recover.
    """
    products = [weight.unexplained(k) * noise.unexplained(rank - k) for k in range(rank + 1)]
    return products.index(min(products))


def energy_split(weight: Subspace, rank: int) -> int:
    """An earlier rule of SRR's authors: ``k = ⌊r · Σ_{i≤r} σ_i² / ‖W S‖²⌋``."""
    return int(rank * (1.0 - weight.unexplained(rank)))


def coarse_candidates(rank: int) -> list[int]:
    """About nine values of k over 0 … r, both ends included."""
    step = max(1, rank // 8)
    return sorted({*range(0, rank + 1, step), rank})


def refined_candidates(best: int, rank: int) -> list[int]:
    """Half a coarse step to both sides of the best value so far; empty once the step was one."""
    half = max(1, rank // 8) // 2
    return [k for k in (best - half, best + half) if half and 0 <= k <= rank]
