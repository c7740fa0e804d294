"""From a matrix to codes and scales: how scales are chosen, and which points of the grid are taken.

A grid says which values exist; two choices are left, and both may look at the metric.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srr_dist.solve.grids import Grid
from srr_dist.solve.metric import Metric
from srr_dist.solve.rounding import descend_codes, descend_scales, gptq
from srr_dist.solve.wavefront import yaqa

_CHUNK = 2**18
"""Entries that the search of scales works on at once: they stay in a core's cache."""


@dataclass(frozen=True)
class Quantizer:
    """What turns ``W: [m, n]`` (float32) into a point of a grid.

    Attributes:
        grid: the values there are.
        scales: ``absmax`` (the grid's own) or ``search`` (least error, each input weighted by its moment).
        rounding: ``nearest``, ``gptq`` (each input's error is made up for by the inputs after it) or ``yaqa`` (and each
            output's by the outputs after it, where the metric has an output side). Under a diagonal moment errors of
            different inputs cannot make up for each other, nor those of different outputs without a full output side:
            the roundings are then the same.
    """

    grid: Grid
    scales: str = "absmax"
    rounding: str = "nearest"

    def damping(self, metric: Metric) -> float:
        """What was added to the moment's diagonal to factor it, in shares of its mean; 0 where nothing is factored."""
        return metric.feedback.damping if self._feeds_back(metric) else 0.0

    def quantize(self, W: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
        """Codes, of the grid's type ``[m, n]``, and scales, bfloat16 ``[m, groups]``."""
        scale, zero = self._scales(W, metric)
        if self.rounding == "yaqa" and metric.outputs is not None and not metric.separate:
            return yaqa(W, scale, self.grid, metric.feedback, metric.outputs.feedback, zero), scale
        if self._feeds_back(metric):
            return gptq(W, scale, self.grid, metric.feedback, zero), scale
        return self.grid.encode(W, scale, zero), scale

    def _scales(self, W: Tensor, metric: Metric) -> tuple[Tensor, Tensor | None]:
        if self.scales == "absmax":
            return next(self.grid.candidates(W))
        return search_scales(W, self.grid, metric.weights)

    def descend(self, W: Tensor, metric: Metric, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Better codes, and scales if they may be chosen, from given ones, in a full metric."""
        codes = descend_codes(W, codes, scale, self.grid, metric.H)
        if self.scales == "search" and self.grid.continuous:
            scale = descend_scales(W, codes, scale, self.grid, metric.H)
        return codes, scale

    def _feeds_back(self, metric: Metric) -> bool:
        return self.rounding != "nearest" and not metric.diagonal


def search_scales(W: Tensor, grid: Grid, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of the grid's ``candidates``, the one with the least ``Σ h_i (w_i − q_i)²`` for each group.

    Args:
        W: float32 ``[m, n]``.
        grid: where the scales come from.
        weights: float32 ``[n]``, h: how much an error at each input counts.

    Returns:
        scale: bfloat16 ``[m, groups]``; zero: None, or float32 ``[m, groups]``; of equal ones the first.
    """
    scales, zeros = zip(
        *(_search_rows(rows, grid, weights) for rows in W.split(max(1, _CHUNK // W.shape[1]))), strict=True
    )
    return torch.cat(scales), None if grid.symmetric else torch.cat(zeros)


def _search_rows(W: Tensor, grid: Grid, weights: Tensor) -> tuple[Tensor, Tensor | None]:
    groups, h = grid.grouped(W), grid.grouped(weights.unsqueeze(0))

    def error(scale: Tensor, zero: Tensor | None) -> Tensor:
        step = scale.float().unsqueeze(-1)
        codes = grid.clamp_(grid.position(groups / step).round_(), zero)
        Q = grid.points(codes).mul_(step).bfloat16()  # as readers will hold it
        return (groups - Q).square_().mul_(h).sum(-1)

    candidates = grid.candidates(W)
    scale, zero = next(candidates)
    least = error(scale, zero)
    for trial, its_zero in candidates:
        found = error(trial, its_zero)
        better = found < least
        scale, least = torch.where(better, trial, scale), torch.where(better, found, least)
        if zero is not None and its_zero is not None:
            zero = torch.where(better, its_zero, zero)
    return scale, zero
