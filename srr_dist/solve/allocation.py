"""Which layers get more bits than others, under one budget.

What a layer does to the loss falls by about four with each bit of its codes, from where it differs between layers by
orders of magnitude. Nearest codes show that as well as better ones, which lower all curves alike, and take no time.
Their errors are as good as independent of each other, so that ``E_s ⟨Δ, G_s⟩²`` is ``Σ_ij Δ_ij² E_s[G_s,ij²]``: a sum
over all weights, where the mean of ``⟨Δ, G_s⟩²`` itself has one number for each of a few dozen sequences.

Bits are bought where they take most off the sum: along the lower convex hull of each layer's curve, for which taking
the steepest step first is optimal but for the last one (Fox, Discrete optimization via marginal analysis, 1966).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from srr_dist.errors import ConfigError
from srr_dist.solve.grids import Grid
from srr_dist.solve.metric import Metric, inner
from srr_dist.solve.quantizer import Quantizer


def width_errors(W: Tensor, grids: Mapping[int, Grid], scales: str, gradients: Iterable[Tensor]) -> dict[int, float]:
    """What the nearest codes of each width in the place of a layer's weights do to the loss, to second order.

    Args:
        W: ``[m, n]``.
        grids: bits of a code -> the grid of such codes.
        scales: how they are chosen, as of ``Quantizer``; an input counts for the squares of its gradients.
        gradients: float32 ``[m, n]``, of sequences held out; those with NaN or Inf do not count.

    Returns:
        Bits of a code -> ``Σ_ij Δ_ij² E_s[G_s,ij²]``; NaN if no sequence is left.
    """
    W, squares, count = W.float(), torch.zeros(W.shape, device=W.device), 0
    for G in gradients:
        if torch.isfinite(energy := G.square()).all():
            squares, count = squares.add_(energy), count + 1
    if not count:
        return dict.fromkeys(grids, math.nan)
    inputs = squares.sum(0)
    metric = Metric(inputs / inputs.mean().clamp_min(torch.finfo(torch.float32).tiny))
    errors = {}
    for bits, grid in grids.items():
        delta = W - grid.dequantize(*Quantizer(grid, scales).quantize(W, metric))
        errors[bits] = inner(delta.square_(), squares) / count
    return errors


def allocate(
    errors: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    mean_bits: float,
    leaders: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """The width of each layer's codes.

    Args:
        errors: layer -> bits of a code -> what such codes do to the loss. Errors add up; all have the same widths.
        sizes: layer -> how many weights it has.
        mean_bits: bits of a code that are there to be spent for each weight, on the average.
        leaders: layer -> the one whose width it has, where some are to have one width; of itself, to have its own.

    Returns:
        Bits of a code for every layer: within the budget; none falls when it grows; steps of equal gain are taken in
        the order of names.

    Raises:
        ConfigError: the budget is less than the least width.
    """
    leaders = leaders or {name: name for name in errors}
    together: dict[str, Counter[int]] = {}
    weights = Counter[str]()
    for name, curve in errors.items():
        together.setdefault(leaders[name], Counter()).update(curve)  # which adds
        weights[leaders[name]] += sizes[name]
    widths = _spent(together, weights, mean_bits)
    return {name: widths[leaders[name]] for name in errors}


def _spent(errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], mean_bits: float) -> dict[str, int]:
    least = min(width for curve in errors.values() for width in curve)
    total = sum(sizes[name] for name in errors)
    if mean_bits < least:
        raise ConfigError(f"mean bits: expected {least} or more, the least width, found {mean_bits:g}")
    left = (mean_bits - least) * total
    steps = [(gain, name, width) for name, curve in errors.items() for gain, width in _steps(curve, sizes[name])]
    chosen = dict.fromkeys(errors, least)
    for _, name, width in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        left -= (width - chosen[name]) * sizes[name]
        if left < 0:
            break
        chosen[name] = width
    return chosen


def _steps(curve: Mapping[int, float], size: int) -> Iterator[tuple[float, int]]:
    """From the least width along the lower convex hull: what a stored bit takes off, and to which width it leads."""
    width = min(curve)
    while wider := [other for other in curve if other > width and curve[other] < curve[width]]:
        gains = {other: (curve[width] - curve[other]) / ((other - width) * size) for other in wider}
        width = max(wider, key=lambda other: (gains[other], other))
        yield gains[width], width
