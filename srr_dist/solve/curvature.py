"""What is measured on sequences held out: whether errors and moments fit the curvature of the network's own loss.

To second order, an error Δ of a layer changes the loss by ``½ E_s ⟨Δ, G_s⟩²``, with ``G_s: [m, n]`` the gradient of a
sequence's loss by the layer's weight, at labels drawn from the network's own predictions (then the expected outer
product of gradients is the curvature). ``H_O ⊗ H_I`` stands for ``E_s vec(G_s) vec(G_s)ᵀ`` in rounding and in adapters
(YAQA, arXiv 2505.22988). Where it was found from too few sequences, a solution for inputs alone may be the better one:
the second-order estimates on other sequences decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from torch import Tensor

from srr_dist.solve.metric import Metric, diagonal_of, inner

ONE_SIDED, TWO_SIDED = "one-sided", "two-sided"
"""Solutions in the metric of a layer's inputs, and in that of its sketch."""

SEQUENCES_SHARE = 0.25
"""Of the sides of B, beside those of K-FAC."""

DOUBT = 1.0
"""Standard errors by which the one-sided solution must be better to be taken: estimates of a few dozen sequences are
ruled by one or two of them, and one alone comes to a single standard error."""

COSINE_OF = 8
"""Gradients that a cosine compares, in pairs."""


def sketch_metric(sides: Mapping[str, Tensor], inputs: Metric, shrinkage: float) -> Metric:
    """The metric of a sketch; where it has the output side alone, beside that of the inputs.

    Sides of B, with a sample for each sequence, are averaged with those of K-FAC, with one for each token, all of mean
    diagonal 1: the input side with the moment of the inputs, the output side with that of the gradients.

    Args:
        sides: ``output`` ``[m, m]``, in bands ``[bands, b, b]``, ``[m]`` or ``[1]``; where the sketch has them
            ``input`` ``[n, n]``, and of single tokens the output side ``tokens``, of the shape of ``output``.
        inputs: the metric of the layer's inputs.
        shrinkage: of the sides, as of a moment.
    """

    def of(side: str) -> Metric:  # one after the other, since each is large, and comes in float64
        return Metric.of(sides[side].to(inputs.H.device), shrinkage)

    own = of("input") if "input" in sides else inputs
    if sides["output"].shape == (1,):  # the same for all outputs of a layer
        return own
    outputs = of("output")
    if "tokens" in sides:
        own, outputs = _averaged(own, inputs), _averaged(outputs, of("tokens"))
    return own.beside(outputs)


def gate(errors: Mapping[str, Tensor], metric: Metric, gradients: Sequence[Tensor]) -> dict[str, Any]:
    """Whether gradients that neither of two solutions has seen say that the two-sided one is the worse.

    Args:
        errors: float32 ``[m, n]``, ``W − Ŵ`` of the ``ONE_SIDED`` and of the ``TWO_SIDED`` solution.
        metric: that of the two-sided one.
        gradients: float32 ``[m, n]``, of the sequences held out, which are asked for one or two at a time.

    Returns:
        ``chosen``, the two-sided one unless its estimate is more than ``DOUBT`` standard errors above the other's, or
        is no number; ``second_order``, the estimates; the ``standard_error`` of the two's difference, over sequences;
        and the ``cosine`` between the sketch and what it stands for. None in the place of what is no number.
    """
    slopes: dict[str, list[float]] = {side: [] for side in errors}
    for G in gradients:  # which may be made as it is asked for: once for both
        for side, error in errors.items():
            slopes[side].append(inner(error, G))
    estimates = {side: _mean_square(along) for side, along in slopes.items()}
    worse, doubt = _worse(slopes[TWO_SIDED], slopes[ONE_SIDED])
    few = gradients[:COSINE_OF]
    return {
        "chosen": TWO_SIDED if worse <= DOUBT * doubt else ONE_SIDED,
        "second_order": {side: _number(estimate) for side, estimate in estimates.items()},
        "standard_error": _number(doubt),
        "cosine": _number(kronecker_cosine(metric, few)) if len(few) > 1 else None,
    }


def kronecker_cosine(metric: Metric, gradients: Sequence[Tensor]) -> float:
    """The cosine between ``H_O ⊗ H_I`` and ``F = E vec(G) vec(G)ᵀ``, estimated on sequences held out, two at least.

    ``⟨H_O ⊗ H_I, F⟩ = E tr(H_O G H_I Gᵀ)`` and ``‖F‖² = E ⟨G, G'⟩²`` over pairs of different sequences, which has no
    bias; so the estimate may exceed 1 where there are few. ``H_O`` counts as it is, without damping.
    """
    count, outputs = len(gradients), metric.outputs
    projection, pairs = 0.0, list[float]()
    for number, G in enumerate(gradients):
        both = metric.right(G)
        projection += inner(both if outputs is None else outputs.left(both), G) / count
        pairs += [inner(G, other) ** 2 for other in gradients[:number]]
    H_O = len(gradients[0]) if outputs is None else inner(outputs.H, outputs.H)  # the identity's
    return projection / math.sqrt(inner(metric.H, metric.H) * H_O * sum(pairs) / len(pairs))


def _averaged(own: Metric, other: Metric) -> Metric:
    """The mean of both, in the memory of the first, which is full unless no gradient has reached the layer."""
    if not own.diagonal:
        H = own.H.mul_(SEQUENCES_SHARE)
        to = diagonal_of(H) if other.diagonal else H
        to.add_(other.H.view_as(to), alpha=1.0 - SEQUENCES_SHARE)
    return own


def _worse(slopes: Sequence[float], than: Sequence[float]) -> tuple[float, float]:
    """By how much the mean square is the larger, and the standard error of that, 0 of one pair; NaN without any."""
    squares = [a**2 - b**2 for a, b in zip(slopes, than, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if not squares:
        return math.nan, math.nan
    return mean(squares), stdev(squares) / math.sqrt(len(squares)) if len(squares) > 1 else 0.0


def _mean_square(slopes: Iterable[float]) -> float:
    squares = [along**2 for along in slopes if math.isfinite(along)]
    return sum(squares) / len(squares) if squares else math.nan


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
