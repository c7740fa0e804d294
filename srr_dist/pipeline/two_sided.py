"""A layer solved for its error at the network's output, if sequences held out say that this is the better solution.

What gradients left behind of a layer, its sketch, gives the metric ``tr(H_O Δ H_I Δᵀ)``. Where it comes from too few
sequences it misleads, and the error of the layer alone is the better guide. Both are solved, and the second-order
estimate of the loss on gradients that no sketch has seen decides.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from srr_dist.checkpoint.graph import Linear
from srr_dist.errors import StoreError
from srr_dist.pipeline.collecting import SketchedLayer
from srr_dist.pipeline.gradients import recall
from srr_dist.pipeline.run import Run
from srr_dist.solve import LayerSolution, Metric, kronecker_cosine, second_order, solve_layer

ONE_SIDED, TWO_SIDED = "one-sided", "two-sided"


def solve_gated(run: Run, linear: Linear, W: Tensor, inputs: Metric) -> LayerSolution:
    """The better one of a layer's solutions in the metric of its inputs and in that of its sketch.

    Its record has ``gate``: which one was ``chosen``, the ``second_order`` estimate of both, and the ``cosine`` between
    the sketch and what it stands for, all on the sequences held out (None without a number).

    Args:
        run: options; says where sketches are.
        linear: the layer.
        W: ``[m, n]``.
        inputs: the metric of its inputs, without an output side.

    Raises:
        StoreError: its sketch is not kept any more; another attempt makes it anew.
    """
    kept = recall(run, linear)
    if kept is None:
        raise StoreError(f"layer {linear.name}: what its gradients left is not kept any more, or was damaged")
    metric, options = two_sided(kept, inputs, run.config.shrinkage), run.solve_options()
    solutions = {
        side: solve_layer(W, its_metric, linear.name, options)
        for side, its_metric in ((ONE_SIDED, inputs), (TWO_SIDED, metric))
    }
    gradients = [kept.held_out[sequence].to(W.device) for sequence in range(len(kept.held_out))]
    errors = {side: W.float() - found.weight(run.grid) for side, found in solutions.items()}
    estimates = {side: second_order(error, gradients) for side, error in errors.items()}
    trusted = estimates[TWO_SIDED] < estimates[ONE_SIDED]  # not if either is no number
    chosen = TWO_SIDED if trusted else ONE_SIDED
    gate = {
        "chosen": chosen,
        "second_order": {side: _number(estimate) for side, estimate in estimates.items()},
        "cosine": _number(kronecker_cosine(metric, gradients)) if len(gradients) > 1 else None,
    }
    solution = solutions[chosen]
    seconds = {
        part: sum(found.result["seconds"][part] for found in solutions.values()) for part in solution.result["seconds"]
    }
    return replace(solution, result=solution.result | {"gate": gate, "seconds": seconds})


def two_sided(kept: SketchedLayer, inputs: Metric, shrinkage: float) -> Metric:
    """The metric of a sketch; where it has the output side alone, beside that of the inputs."""
    sides = {side: H.to(inputs.H.device) for side, H in kept.sketch.value().items()}
    own = Metric.of(sides["input"], shrinkage) if "input" in sides else inputs
    # A single number is the same for all outputs of a layer.
    return own if sides["output"].shape == (1,) else own.beside(Metric.of(sides["output"], shrinkage))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
