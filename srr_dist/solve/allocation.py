"""Which layers get more bits than others, under one budget.

What a layer does to the loss falls by about four with each bit of its codes, from where it differs between layers by
orders of magnitude. Bits are bought where they take most off the sum: along the lower convex hull of each layer's
curve, for which taking the steepest step first is optimal but for the last one (Fox, Discrete optimization via marginal
analysis, 1966).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from srr_dist.errors import ConfigError


def allocate(errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], mean_bits: float) -> dict[str, int]:
    """The width of each layer's codes.

    Args:
        errors: layer, or layers that are to have one width -> bits of a code -> what such codes do to the loss. Errors
            add up; all have the same widths.
        sizes: the same names -> how many weights there are.
        mean_bits: bits of a code that are there to be spent for each weight, on the average.

    Returns:
        Bits of a code for every name: within the budget; none falls when it grows; steps of equal gain are taken in
        the order of names.

    Raises:
        ConfigError: the budget is less than the least width.
    """
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
