"""What can be done with one layer: preserve, quantize, reconstruct, and improve codes and adapter in turn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from srr_dist.seeds import layer_seed
from srr_dist.solve.lowrank import Subspace, block_size, leading_subspace, principal, start_directions
from srr_dist.solve.metric import Metric, less
from srr_dist.solve.quantizer import Quantizer
from srr_dist.solve.split import criterion_split, random_subspace


@dataclass(frozen=True)
class SolveOptions:
    """What the solver needs to know of a run.

    Attributes:
        method: ``srr``, ``qer`` (k = 0) or ``none`` (no adapter).
        quantizer: grid, scales and rounding.
        rank: r, cut to min(m, n) of a layer.
        split: ``search``, ``criterion``, ``energy`` or ``fixed:K``.
        form: ``joint`` (best rank-r approximation of W − Q) or ``split`` (P_k plus the best rank r − k of the rest).
        iterations: how often ``W − L R`` is quantized and W − Q approximated again, the best of all kept.
        descent: how often after that codes and scales descend from where they are, and W − Q is approximated again; not
            under a diagonal moment of the inputs.
        rounding_metric: what iterations and descent work in: ``full``, the metric itself, or ``downdated``, what is
            left of a full one beyond the adapter's rows.
        seed: the run's seed.
    """

    method: str
    quantizer: Quantizer
    rank: int
    split: str = "search"
    form: str = "joint"
    iterations: int = 0
    descent: int = 0
    rounding_metric: str = "full"
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """The layer solved with one k, before the factors are rounded."""

    k: int
    codes: Tensor
    scale: Tensor
    L: Tensor
    R: Tensor
    energies: Tensor
    error: float
    """``‖W − Q‖²_H``, the error without an adapter."""
    objective: float
    damping: float
    iteration: int = 0


class Problem:
    """One layer's weight and metric, and what every k shares."""

    def __init__(self, W: Tensor, metric: Metric, name: str, options: SolveOptions) -> None:
        self.W, self.metric, self.options = W, metric, options
        m, n = W.shape
        self.rank = 0 if options.method == "none" else min(options.rank, m, n)
        self.seed = layer_seed(options.seed, name)
        self.directions = start_directions(metric, block_size(m, n, self.rank)) if self.rank else W[:0].mT
        self.weight = self._subspace(W, self.rank if options.method == "srr" else 0)

    def criterion(self) -> int:
        """The paper's k for this layer."""
        noise = random_subspace(self.W.shape[0], self.metric, self.rank, self.directions, self.seed)
        return criterion_split(self.weight, noise, self.rank)

    def candidate(self, k: int, quantizer: Quantizer) -> Candidate:
        """Preserve k directions, quantize the residual, reconstruct with the rank that the form leaves."""
        U_k, R_k = self.weight.U[:, :k], self.weight.R[:k]
        L_k, scaled = self.metric.unwhitened(U_k, R_k)
        codes, scale = quantizer.quantize(less(self.W, L_k, scaled), self.metric)  # W − P_k
        damping = quantizer.damping(self.metric)
        if self.options.form == "joint":
            return self._reconstructed(codes, scale, damping, k)
        Q = quantizer.grid.dequantize(codes, scale)
        found = self._subspace(less(self.W, L_k, scaled).sub_(Q), self.rank - k)
        *factors, energies = principal(torch.cat((U_k, found.U), dim=1), torch.cat((R_k, found.R)), self.metric.inputs)
        error = self.metric.energy(torch.sub(self.W, Q, out=Q))
        return Candidate(k, codes, scale, *self.metric.unwhitened(*factors), energies, error, found.tail, damping)

    def error(self, codes: Tensor, scale: Tensor) -> Tensor:
        """``W − Q``, in the memory of Q."""
        Q = self.options.quantizer.grid.dequantize(codes, scale)
        return torch.sub(self.W, Q, out=Q)

    def improved(self, start: Candidate) -> Candidate:
        """Quantize what the adapter leaves, and approximate what the codes leave, in turn; the best is kept.

        First with codes and scales found anew, then with such that descend from the best.
        """
        best = current = start
        anew = self.options.iterations if self.rank else 0
        for number in range(1, anew + 1):
            current = replace(self._reconstructed(*self._anew(current), start.k), iteration=number)
            best = min(best, current, key=lambda candidate: candidate.objective)
        current = best
        for number in range(anew + 1, anew + 1 + (0 if self.metric.diagonal else self.options.descent)):
            beside = self._beside(current, nearby=True)
            codes, scale = self.options.quantizer.descend(*beside, current.codes, current.scale)
            current = replace(self._reconstructed(codes, scale, current.damping, start.k), iteration=number)
            best = min(best, current, key=lambda candidate: candidate.objective)
        return best

    def _anew(self, current: Candidate) -> tuple[Tensor, Tensor, float]:
        """Codes and scales beside an adapter, and the damping; the metric they were found in is let go."""
        residual, metric = self._beside(current)
        return *self.options.quantizer.quantize(residual, metric), self.options.quantizer.damping(metric)

    def _beside(self, current: Candidate, *, nearby: bool = False) -> tuple[Tensor, Metric]:
        """What codes should be near to, and in which metric, beside an adapter that will be fitted to them again.

        Beyond its rows, whatever the codes will be. Where they stay nearby, so does the adapter, and L follows as well:
        beyond its columns too, where outputs depend on each other anyway.
        """
        residual, metric = less(self.W, current.L, current.R), self.metric
        if self.options.rounding_metric != "downdated" or not self.rank or metric.diagonal:
            return residual, metric
        metric = metric.beyond(current.R)
        if nearby and metric.outputs is not None and not metric.separate:
            metric = replace(metric, outputs=metric.outputs.beyond(current.L.mT))
        return residual, metric

    def _reconstructed(self, codes: Tensor, scale: Tensor, damping: float, k: int) -> Candidate:
        """Give all ranks to the best approximation of ``W − Q``."""
        found = self._subspace(self.error(codes, scale), self.rank)
        L, R = self.metric.unwhitened(found.U, found.R)
        return Candidate(k, codes, scale, L, R, found.energies, found.total, found.tail, damping)

    def _subspace(self, E: Tensor, rank: int) -> Subspace:
        """Of E, in whitened rows."""
        return leading_subspace(self.metric.whitened(E), self.metric.inputs, rank, self.directions)
