"""Scales: the best of those worth trying, before there are codes, and those that fit given codes.

With codes given, ``Q = P ∘ S`` is linear in the scales S: the error in a full metric ``tr(H_O E H_I Eᵀ)`` is a
quadratic form of all of them, in which every group of every row has to do with every other. Conjugate gradients come
near to its least value in a few products with both sides, preconditioned by the curvature of each scale by itself.
Where rows are apart, taking the groups one after the other is cheaper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srr_dist.solve.grids import Grid
from srr_dist.solve.metric import Metric, inner

_CHUNK = 2**18
"""Entries that the search works on at once: they stay in a core's cache."""

FIT_STEPS = 6
"""Of conjugate gradients: what further ones change is lost where scales are rounded to bfloat16."""


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


def fit_scales(W: Tensor, codes: Tensor, scale: Tensor, grid: Grid, metric: Metric) -> Tensor:
    """Scales under which given codes have less error in a metric of full sides, or the given ones if none are found.

    Args:
        W: float32 ``[m, n]``.
        codes: of the grid's type ``[m, n]``.
        scale: bfloat16 ``[m, groups]``, where to begin.
        grid: of the codes; its scales may be any bfloat16 number but 0.
        metric: with a full output side, which is damped as wherever it is used.

    Returns:
        bfloat16 ``[m, groups]``.
    """
    points = grid.grouped(grid.points(codes))
    start = W - grid.dequantize(codes, scale)
    residual = _by_group(points, metric.both(start))
    curvature = _curvature(points, metric)
    change = torch.zeros_like(residual)
    toward = along = residual / curvature
    slope = inner(residual, toward)
    for _ in range(FIT_STEPS):
        pressed = _by_group(points, metric.both((points * along.unsqueeze(-1)).reshape(W.shape)))
        if (bend := inner(along, pressed)) <= 0.0:
            break
        change.add_(along, alpha=slope / bend)
        residual.sub_(pressed, alpha=slope / bend)
        toward = residual / curvature
        slope, before = inner(residual, toward), slope
        along = toward + along * (slope / before)
    found = (scale.float() + change).bfloat16()
    found = torch.where(found == 0, scale, found)
    better = metric.energy(W - grid.dequantize(codes, found)) < metric.energy(start)
    return found if better else scale


def descend_scales(W: Tensor, codes: Tensor, scale: Tensor, grid: Grid, metric: Metric) -> Tensor:
    """Each group's scale in turn at the best value beside all others, where that lowers the error as it is stored.

    One product with H for all of them, where rows have nothing to do with each other. Arguments as for ``fit_scales``,
    with a metric of a full input side, whose output side plays no part; returns bfloat16 ``[m, groups]``.
    """
    error, found, points = W - grid.dequantize(codes, scale), scale.clone(), grid.grouped(grid.points(codes))
    size, curvature = points.shape[-1], _curvature(points, metric.inputs)
    for group in range(scale.shape[1]):
        inputs = slice(group * size, (group + 1) * size)
        old, bend = scale[:, group], curvature[:, group]
        slope = (error @ metric.H[:, inputs]).mul_(points[:, group]).sum(-1)
        new = (old.float() + slope / bend).bfloat16()
        change = new.float() - old.float()
        better = (change * (2.0 * slope - change * bend) > 0) & (new != 0)
        found[:, group] = torch.where(better, new, old)
        error[:, inputs] = W[:, inputs] - grid.dequantize(codes[:, inputs], found[:, group : group + 1])
    return found


def _by_group(points: Tensor, slopes: Tensor) -> Tensor:
    """What slopes ``[m, n]`` by each weight are by each scale: ``[m, groups]``."""
    return (points * slopes.reshape(points.shape)).sum(-1)


def _curvature(points: Tensor, metric: Metric) -> Tensor:
    """Of the error by each scale alone, ``[m, groups]``; 1 for groups of zeros, which nothing moves."""
    size = points.shape[-1]
    own = []
    for group in range(points.shape[1]):
        inputs = slice(group * size, (group + 1) * size)
        P, H = points[:, group], metric.H[inputs]
        own.append((P * H if metric.diagonal else P @ H[:, inputs]).mul_(P).sum(-1))
    found = torch.stack(own, dim=1)
    if metric.outputs is not None:
        found.mul_((metric.outputs.weights + metric.outputs.damping).unsqueeze(1))
    return torch.where(found > 0, found, 1.0)
