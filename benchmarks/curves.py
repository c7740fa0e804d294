"""What codes of each width do to a model's loss, layer by layer, and the widths that a number of bits is spent on best.

A layer is rounded to the nearest codes, which takes no time beside solving it: layers differ in what they bear by
orders of magnitude, and better roundings lower all curves.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from srr_dist.checkpoint.graph import Linear
from srr_dist.solve import Metric, Quantizer, SolveOptions, allocate, make_grid, second_order, solve_layer


class Curves:
    """By layer, or by input where layers that read one share a width.

    Args:
        widths: bits that codes may have.
        grid, group_size: of the codes.
        together: whether layers of one input share a width, as vLLM wants it of those that it runs as one.
    """

    def __init__(self, widths: Sequence[int], grid: str, group_size: int, *, together: bool) -> None:
        self._grids = {bits: make_grid(grid, bits, group_size) for bits in widths}
        self._together = together
        self._errors: dict[str, dict[int, float]] = {}
        self._sizes: Counter[str] = Counter()
        self._layers: dict[str, list[str]] = {}

    def add(self, linear: Linear, W: Tensor, metric: Metric, held_out: Sequence[Tensor]) -> None:
        """Measure a layer by the second-order estimate on gradients that no solution will see."""
        name = linear.input if self._together else linear.name
        curve = self._errors.setdefault(name, dict.fromkeys(self._grids, 0.0))
        for bits, grid in self._grids.items():
            options = SolveOptions("none", Quantizer(grid, "search", "nearest"), 0)
            solution = solve_layer(W, metric, linear.name, options)
            curve[bits] += second_order(W - solution.weight(grid), held_out)
        self._sizes[name] += W.numel()
        self._layers.setdefault(name, []).append(linear.name)

    def widths(self, mean_bits: float) -> dict[str, int]:
        """Bits of every layer's codes; written to the errors' stream as the rules of a run."""
        chosen = allocate(self._errors, self._sizes, mean_bits)
        widths = {layer: bits for name, bits in chosen.items() for layer in self._layers[name]}
        ((most, _),) = Counter(widths.values()).most_common(1)
        rules = (f"^{re.escape(layer)}$={bits}" for layer, bits in widths.items() if bits != most)
        print(f"{mean_bits:g} bits: --bits {most} --widths '{' '.join(rules)}'", file=sys.stderr)
        return widths
