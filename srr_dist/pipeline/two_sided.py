"""A layer solved for its error at the network's output, unless sequences held out say that this is the worse solution.

What gradients left behind of a layer, its sketch, gives the metric ``tr(H_O Δ H_I Δᵀ)``. Where it comes from too few
sequences it misleads, and the error of the layer alone is the better guide. Both are solved, and the second-order
estimate of the loss on gradients that no sketch has seen decides.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from srr_dist.checkpoint.graph import Linear
from srr_dist.errors import StoreError
from srr_dist.pipeline.gradients import recall
from srr_dist.pipeline.run import Run
from srr_dist.solve import ONE_SIDED, TWO_SIDED, LayerSolution, Metric, gate, sketch_metric, solve_layer


def solve_gated(run: Run, linear: Linear, W: Tensor, inputs: Metric) -> LayerSolution:
    """A layer's solution in the metric of its sketch, or if it is the worse one that in the metric of its inputs.

    Its record has ``gate``: what ``solve.gate`` says of the two.

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
    metric = sketch_metric(kept.sketch.take(), inputs, run.config.shrinkage)
    grid = run.grid_of(linear.name)
    options = run.solve_options(grid)
    solutions = {
        side: solve_layer(W, its_metric, linear.name, options)
        for side, its_metric in ((ONE_SIDED, inputs), (TWO_SIDED, metric))
    }
    errors = {side: W.float() - found.weight(grid) for side, found in solutions.items()}
    choice = gate(errors, metric, kept.held_out.on(W.device))
    solution = solutions[choice["chosen"]]
    seconds = {
        part: sum(found.result["seconds"][part] for found in solutions.values()) for part in solution.result["seconds"]
    }
    return replace(solution, result=solution.result | {"gate": choice, "seconds": seconds})
