"""What it takes to solve the layers of a block, in bytes: the matrices that are alive at once.

A moment's float64 sums become the solver's float32 matrix once, and are let go. The layers that share it are solved one
after the other, and each goes through phases that are let go as well: its peak is that of the largest phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srr_dist.calibration import moment_bytes
from srr_dist.calibration.sketches import output_bands
from srr_dist.checkpoint.graph import Linear

_Groups = Sequence[Sequence[Linear]]


@dataclass(frozen=True)
class Solving:
    """How layers are solved, as far as memory goes.

    Attributes:
        feedback: whether moments are factored for rounding with error feedback.
        descent: whether codes and scales descend after that.
        downdated: whether iterations and descent work beyond the adapter, in a moment of each layer's own.
        code_bytes: of a code that is not packed.
        tuned: whether layers are tuned and measured again after that, so that moments stay.
        gated: whether there is a solution for a sketch besides, and gradients choose between the two.
        band: outputs of a block of a sketch's output side, at most; 0 for all.
    """

    feedback: bool = False
    descent: bool = False
    downdated: bool = False
    code_bytes: int = 1
    tuned: bool = False
    gated: bool = False
    band: int = 0


def solve_bytes(groups: _Groups, solving: Solving, scaling: str, at_once: int, *, on_gpu: bool) -> int:
    """The most alive at once where moments lie elsewhere; to a GPU they come as they are, in float64.

    Args:
        groups: layers that share an input.
        solving: how.
        scaling: of the moments.
        at_once: groups that are solved side by side.
        on_gpu: whether it happens there.
    """
    return at_once * max(
        (max(_arriving(group, scaling) * on_gpu, _peak(group, solving, scaling)) for group in groups), default=0
    )


def solve_bytes_beside(groups: _Groups, solving: Solving, scaling: str, at_once: int) -> int:
    """The most alive at once where moments lie beside, those of groups not yet solved among it; arguments as above."""
    sums = [moment_bytes(group[0].in_features, scaling) for group in groups]
    peaks = [_peak(group, solving, scaling) for group in groups]
    if solving.tuned:
        peaks = [max(peak, _arriving(group, scaling)) for group, peak in zip(groups, peaks, strict=True)]
    if at_once > 1 or solving.tuned:
        return sum(sums) + at_once * max(peaks, default=0)
    return max((sum(sums[i + 1 :]) + max(sums[i] * 3 // 2, peak) for i, peak in enumerate(peaks)), default=0)


def _arriving(group: Sequence[Linear], scaling: str) -> int:
    """A copy of the sums, and the float32 matrix that is made of it."""
    return moment_bytes(group[0].in_features, scaling) * 3 // 2


def _peak(group: Sequence[Linear], solving: Solving, scaling: str) -> int:
    """Of the phases of a layer, the largest; codes are those of two candidates and of a third that is being made."""
    n, m = group[0].in_features, max(linear.out_features for linear in group)
    weights, codes = n * m, 3 * solving.code_bytes
    if scaling != "exact":
        return weights * (12 + codes) + 4 * n
    moment, feedback, downdated = n * n, solving.feedback, solving.downdated
    phases = [weights * (12 + codes) + 4 * moment]  # W, W − L R, and what it is divided to; or W, W − Q, L R
    if feedback or downdated:
        # Beside W and W − L R: H, again in the order of rounding, and that in float64, where its factor is made; beyond
        # an adapter H, its factor and the downdated H. Without factors H, and in float64 and float32 the downdated one.
        factored = 16 + 8 * downdated if feedback else 16
        phases.append(weights * (8 + codes) + factored * moment)
    if feedback or solving.descent:
        # W, W − L R, and by inputs: what has moved, targets, scales, codes. H, its factor, the downdated H, and that
        # one's factor or damped copy.
        kept = 1 + feedback + downdated + (solving.descent or downdated)
        phases.append(weights * (20 + codes + solving.code_bytes) + 4 * kept * moment)
    return max(phases) + (_two_sided(m, n, solving) if solving.gated else 0)


def _two_sided(m: int, n: int, solving: Solving) -> int:
    """Beside that: the sides of a sketch, used and factored, and what rounding or descent has of its own.

    Rounding has copies of the factors, that of one once more, and antidiagonals: five numbers at each place of m + n of
    them, and the errors of complete tiles twice; outputs go band by band. Descent has what conjugate gradients keep of
    the scales' points, and the output side beyond an adapter. The gate, with two errors and two gradients, has less.
    """
    bands = output_bands(m, solving.band)
    outputs, width = m * m // bands, m // bands
    factors = width**2 + n * n + max(width, n) ** 2
    diagonals = 5 * (width + n) * min(width, n) + 2 * width * n
    descent = 5 * m * n + 2 * outputs * solving.downdated
    return 8 * (outputs + n * n) + 4 * max(factors + diagonals, descent)
