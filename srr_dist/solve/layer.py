"""One layer: weight and metric in, codes, scales and adapter out.

``solve_layer`` reads as the method does: preserve, quantize the residual, reconstruct, choose k, alternate, round the
factors to bfloat16 and measure with what will be stored.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from srr_dist.solve.grids import Grid
from srr_dist.solve.lowrank import Subspace, block_size, leading_subspace, principal, refit, start_directions
from srr_dist.solve.metric import Metric
from srr_dist.solve.quantizer import Quantizer
from srr_dist.solve.split import (
    coarse_candidates,
    criterion_split,
    energy_split,
    layer_seed,
    random_subspace,
    refined_candidates,
)


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
        rounding_metric: what iterations round in: ``full``, the metric itself, or ``downdated``, what is left of a full
            one beyond the adapter's rows.
        seed: the run's seed.
    """

    method: str
    quantizer: Quantizer
    rank: int
    split: str = "search"
    form: str = "joint"
    iterations: int = 0
    rounding_metric: str = "full"
    seed: int = 0


@dataclass(frozen=True)
class Stored:
    """A layer in the types that are stored.

    Attributes:
        codes: of the grid's type ``[m, n]``, without zero points.
        scale: bfloat16 ``[m, groups]``.
        L: bfloat16 ``[m, r]``; R: bfloat16 ``[r, n]``. r = 0 without an adapter.
    """

    codes: Tensor
    scale: Tensor
    L: Tensor
    R: Tensor

    def weight(self, grid: Grid) -> Tensor:
        """``Q + L R``, float32 ``[m, n]``."""
        return grid.dequantize(self.codes, self.scale).addmm_(self.L.float(), self.R.float())

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        tensors = {f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class LayerSolution(Stored):
    """A solved layer; the columns of L and rows of R are sorted by singular value.

    Attributes:
        singular_values: float32 ``[r]``, of ``L R S``.
        result: the layer's record, JSON values only: name, shape, rank, k, k_criterion, objective (``k0``,
            ``criterion``, ``chosen`` before and ``stored`` after the factors are rounded; ``tr(Δ H Δᵀ)``), energy
            (``tr(W H Wᵀ)``), candidates (k -> objective), iteration (which one was kept, 0 for none), singular_values,
            seed, damping, bits_per_weight, seconds.
    """

    singular_values: Tensor
    result: dict[str, Any]


@dataclass(frozen=True)
class _Candidate:
    """The layer solved with one k, before the factors are rounded."""

    k: int
    codes: Tensor
    scale: Tensor
    Q: Tensor
    L: Tensor
    R: Tensor
    energies: Tensor
    error: float
    """``‖W − Q‖²_H``, the error without an adapter."""
    objective: float
    damping: float
    iteration: int = 0


class _Problem:
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

    def candidate(self, k: int) -> _Candidate:
        """Preserve k directions, quantize the residual, reconstruct with the rank that the form leaves."""
        U_k, R_k = self.weight.U[:, :k], self.weight.R[:k]
        residual = self.W - U_k @ R_k  # W − P_k
        if self.options.form == "joint":
            return self._reconstructed(residual, k, self.metric)
        codes, scale, Q, damping = self._quantized(residual, self.metric)
        found = self._subspace(residual - Q, self.rank - k)
        L, R, energies = principal(torch.cat((U_k, found.U), dim=1), torch.cat((R_k, found.R)), self.metric)
        return _Candidate(k, codes, scale, Q, L, R, energies, self.metric.energy(self.W - Q), found.tail, damping)

    def alternated(self, start: _Candidate) -> _Candidate:
        """Quantize what the adapter leaves, and approximate what the codes leave, in turn; the best is kept."""
        best = current = start
        for iteration in range(1, self.options.iterations + 1 if self.rank else 1):
            residual, metric = self.W - current.L @ current.R, self._rounding_metric(current.R)
            current = replace(self._reconstructed(residual, start.k, metric), iteration=iteration)
            if current.objective < best.objective:
                best = current
        return best

    def _rounding_metric(self, R: Tensor) -> Metric:
        """The metric in which to choose codes beside an adapter with rows R, which will be fitted to them again."""
        downdated = self.options.rounding_metric == "downdated" and self.rank and not self.metric.diagonal
        return self.metric.beyond(R) if downdated else self.metric

    def _reconstructed(self, residual: Tensor, k: int, metric: Metric) -> _Candidate:
        """Quantize a residual in a metric, and give all ranks to the best approximation of ``W − Q``."""
        codes, scale, Q, damping = self._quantized(residual, metric)
        found = self._subspace(self.W - Q, self.rank)
        return _Candidate(k, codes, scale, Q, found.U, found.R, found.energies, found.total, found.tail, damping)

    def _quantized(self, residual: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor, float]:
        quantizer = self.options.quantizer
        codes, scale = quantizer.quantize(residual, metric)
        return codes, scale, quantizer.grid.dequantize(codes, scale), quantizer.damping(metric)

    def _subspace(self, E: Tensor, rank: int) -> Subspace:
        return leading_subspace(E, self.metric, rank, self.directions)


def solve_layer(W: Tensor, metric: Metric, name: str, options: SolveOptions) -> LayerSolution:
    """Solve ``W ≈ Q + L R`` for one linear layer.

    Args:
        W: ``[m, n]``, any float type, finite; solved in float32.
        metric: the moment of the layer's input, n inputs.
        name: full module name; seeds the layer's random numbers.
        options: method, grid, rank, split, form.

    Source: SRR, arXiv 2602.02001, with the joint form of its reconstruction: ``L R`` is the best rank-r approximation
    of ``W − Q``, never worse than ``P_k`` plus a rank-(r − k) correction, which is one candidate of that rank.
    """
    started = time.perf_counter()
    problem = _Problem(W.float(), metric, name, options)
    chosen, objectives, k_criterion = _choose(problem)
    chosen = problem.alternated(chosen)
    L, R = _stored_factors(chosen.L, chosen.R)
    stored = metric.remainder(problem.W - chosen.Q, chosen.error, L.float(), R.float())
    sigma = (chosen.energies * metric.unit).sqrt().float()
    m, n = W.shape
    unit = metric.unit
    result = {
        "name": name,
        "shape": [m, n],
        "rank": problem.rank,
        "k": chosen.k,
        "k_criterion": k_criterion,
        "objective": {
            "k0": unit * objectives[0] if 0 in objectives else None,
            "criterion": unit * objectives[k_criterion] if k_criterion is not None else None,
            "chosen": unit * chosen.objective,
            "stored": unit * stored,
        },
        "energy": unit * problem.weight.total,
        "candidates": {str(k): unit * objectives[k] for k in sorted(objectives)},
        "iteration": chosen.iteration,
        "singular_values": sigma.tolist(),
        "seed": problem.seed,
        "damping": chosen.damping,
        "bits_per_weight": options.quantizer.grid.bits_per_weight(n) + 16 * problem.rank * (m + n) / (m * n),
        "seconds": {"solve": time.perf_counter() - started},
    }
    return LayerSolution(chosen.codes, chosen.scale, L, R, sigma, result)


def _choose(problem: _Problem) -> tuple[_Candidate, dict[int, float], int | None]:
    """The candidate to keep, the objectives of all k tried, and the criterion's k (None without a split)."""
    options, rank = problem.options, problem.rank
    if options.method != "srr":
        only = problem.candidate(0)
        return only, {0: only.objective}, None
    k_criterion = problem.criterion()
    wanted = _wanted_split(options.split, k_criterion, problem)
    objectives: dict[int, float] = {}
    kept: _Candidate | None = None

    def attempt(ks: list[int]) -> _Candidate:
        nonlocal kept
        for k in ks:
            if k not in objectives:
                candidate = problem.candidate(k)
                objectives[k] = candidate.objective
                # The wanted k, or without one the least objective, ties to the smaller k.
                if kept is None or _preference(candidate, wanted) < _preference(kept, wanted):
                    kept = candidate
        assert kept is not None
        return kept

    if wanted is not None:
        return attempt([wanted, 0, k_criterion]), objectives, k_criterion
    best = attempt([0, k_criterion, *coarse_candidates(rank)])
    return attempt(refined_candidates(best.k, rank)), objectives, k_criterion


def _preference(candidate: _Candidate, wanted: int | None) -> tuple[bool, float, int]:
    return wanted not in (None, candidate.k), candidate.objective, candidate.k


def _wanted_split(split: str, k_criterion: int, problem: _Problem) -> int | None:
    """The k that a rule names, or None for the search."""
    match split.partition(":"):
        case ("search", _, _):
            return None
        case ("criterion", _, _):
            return k_criterion
        case ("energy", _, _):
            return energy_split(problem.weight, problem.rank)
        case ("fixed", _, k):
            return min(int(k), problem.rank)
    raise ValueError(f"split: {split!r} is not a rule")


def remeasured(W: Tensor, metric: Metric, solution: LayerSolution, changed: Stored, grid: Grid) -> LayerSolution:
    """What a solution is once its codes, scales and factors are others: factors sorted, its record measured again.

    Args:
        W: ``[m, n]``.
        metric: the moment of the layer's input.
        solution: what it found.
        changed: what is to be stored instead.
        grid: of the codes.
    """
    error = W.float() - grid.dequantize(changed.codes, changed.scale)
    found = principal(changed.L.float(), changed.R.float(), metric)
    L, R = _stored_factors(*found[:2])
    stored = metric.remainder(error, metric.energy(error), L.float(), R.float())
    sigma = (found[2] * metric.unit).sqrt().float()
    objective = solution.result["objective"] | {"stored": metric.unit * stored}
    result = solution.result | {"objective": objective, "singular_values": sigma.tolist()}
    return LayerSolution(changed.codes, changed.scale, L, R, sigma, result)


def _stored_factors(L: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
    """L and R in bfloat16, each pair of a column and a row of about equal length, as fine-tuning wants them.

    Once L is rounded, R is fitted to the rounded L, so that only R's own rounding is left: where the adapter captures
    nearly all of the energy (the first blocks), rounding both independently would decide the error.
    """
    lengths = R.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    stored = (L * lengths).bfloat16()
    return stored, refit(stored.float(), L, R).bfloat16()
