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
from srr_dist.solve.lowrank import principal, refit
from srr_dist.solve.metric import Metric
from srr_dist.solve.problem import Candidate, Problem, SolveOptions
from srr_dist.solve.quantizer import Quantizer
from srr_dist.solve.split import coarse_candidates, energy_split, refined_candidates


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
            (``tr(W H Wᵀ)``), candidates (k -> objective), search (the same of all k that a search tried, with the
            plainest quantizer), iteration (which one was kept, 0 for none; descent counts on), singular_values, seed,
            damping, bits_per_weight, seconds. Under a metric with an output side also damping_output; objective and
            energy are then ``tr(H_O Δ H Δᵀ)`` and ``tr(H_O W H Wᵀ)``, with ``H_O`` so damped.
    """

    singular_values: Tensor
    result: dict[str, Any]


def solve_layer(W: Tensor, metric: Metric, name: str, options: SolveOptions) -> LayerSolution:
    """Solve ``W ≈ Q + L R`` for one linear layer.

    Args:
        W: ``[m, n]``, any float type, finite; solved in float32.
        metric: the moment of the layer's input, n inputs, and of its output, m outputs, if it has that side.
        name: full module name; seeds the layer's random numbers.
        options: method, grid, rank, split, form.

    Source: SRR, arXiv 2602.02001, with the joint form of its reconstruction: ``L R`` is the best rank-r approximation
    of ``W − Q``, never worse than ``P_k`` plus a rank-(r − k) correction, which is one candidate of that rank.
    """
    started = time.perf_counter()
    W = W.float()  # and the source's own is let go, which on a GPU is a copy
    problem = Problem(W, metric, name, options)
    contest, k_criterion, search = _choose(problem)
    searched = search.objectives if search else {}
    chosen, objectives = problem.improved(contest.best), contest.objectives
    L, R = _stored_factors(chosen.L, chosen.R, metric)
    stored = metric.remainder(problem.error(chosen.codes, chosen.scale), chosen.error, L.float(), R.float())
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
        "search": {str(k): unit * searched[k] for k in sorted(searched)},
        "iteration": chosen.iteration,
        "singular_values": sigma.tolist(),
        "seed": problem.seed,
        "damping": chosen.damping,
        "bits": options.quantizer.grid.bits,
        "bits_per_weight": options.quantizer.grid.bits_per_weight(n) + 16 * problem.rank * (m + n) / (m * n),
        "seconds": {"solve": time.perf_counter() - started, "search": search.seconds if search else 0.0},
    }
    if metric.outputs is not None:
        result["damping_output"] = metric.outputs.damping
    return LayerSolution(chosen.codes, chosen.scale, L, R, sigma, result)


class _Contest:
    """Candidates of one quantizer by their k, of which the best alone is held.

    Attributes:
        objectives: of every k that was entered.
        best: the one with the wanted k, or without one the least objective, ties to the smaller k.
        seconds: that all of this took.
    """

    best: Candidate
    seconds: float = 0.0

    def __init__(self, problem: Problem, quantizer: Quantizer, wanted: int | None = None) -> None:
        self._problem, self._quantizer, self._wanted = problem, quantizer, wanted
        self.objectives: dict[int, float] = {}

    def enter(self, *ks: int) -> int:
        """Solve with each of these k that is new; the best k so far."""
        started = time.perf_counter()
        for k in ks:
            if k not in self.objectives:
                candidate = self._problem.candidate(k, self._quantizer)
                if not self.objectives or self._rank(candidate) < self._rank(self.best):
                    self.best = candidate
                self.objectives[k] = candidate.objective
        self.seconds += time.perf_counter() - started
        return self.best.k

    def _rank(self, candidate: Candidate) -> tuple[bool, float, int]:
        return self._wanted not in (None, candidate.k), candidate.objective, candidate.k


def _choose(problem: Problem) -> tuple[_Contest, int | None, _Contest | None]:
    """The contest that decided about k, the criterion's k (None without a split), and that of a search.

    A search compares with the grid's own scales and nearest codes, which rank the k nearly as the whole quantizer does
    at a fraction of its time; that one judges what the search found beside k = 0 and the criterion's k.
    """
    options, plain = problem.options, Quantizer(problem.options.quantizer.grid)
    if options.method != "srr":
        contest = _Contest(problem, options.quantizer)
        contest.enter(0)
        return contest, None, None
    k_criterion = problem.criterion()
    wanted = _wanted_split(options.split, k_criterion, problem)
    contest = _Contest(problem, options.quantizer, wanted)
    if wanted is not None:
        contest.enter(wanted, 0, k_criterion)
        return contest, k_criterion, None
    search = contest if options.quantizer == plain else _Contest(problem, plain)
    coarse = search.enter(0, k_criterion, *coarse_candidates(problem.rank))
    contest.enter(search.enter(*refined_candidates(coarse, problem.rank)), 0, k_criterion)
    return contest, k_criterion, search


def _wanted_split(split: str, k_criterion: int, problem: Problem) -> int | None:
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
    *factors, energies = principal(metric.whitened(changed.L.float()), changed.R.float(), metric.inputs)
    L, R = _stored_factors(*metric.unwhitened(*factors), metric)
    stored = metric.remainder(error, metric.energy(error), L.float(), R.float())
    sigma = (energies * metric.unit).sqrt().float()
    objective = solution.result["objective"] | {"stored": metric.unit * stored}
    result = solution.result | {"objective": objective, "singular_values": sigma.tolist()}
    return LayerSolution(changed.codes, changed.scale, L, R, sigma, result)


def _stored_factors(L: Tensor, R: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """L and R in bfloat16, each pair of a column and a row of about equal length, as fine-tuning wants them.

    Once L is rounded, R is fitted to the rounded L, so that only R's own rounding is left: where the adapter captures
    nearly all of the energy (the first blocks), rounding both independently would decide the error.
    """
    lengths = R.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    stored = (L * lengths).bfloat16()
    return stored, refit(metric.whitened(stored.float()), metric.whitened(L), R).bfloat16()
