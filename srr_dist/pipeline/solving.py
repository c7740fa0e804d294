"""The layers of one block, solved from their weights and moments.

A layer of a small model is too little work for several threads, so that on CPUs small layers are solved side by side,
each on one thread. A layer's bits do not depend on the number of threads, and the order of the results is the block's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from srr_dist.calibration import InputMoment
from srr_dist.checkpoint.graph import Block, Linear, shared_inputs
from srr_dist.errors import CalibrationError
from srr_dist.export.adapter import adapter_tensors
from srr_dist.export.base import linear_tensors
from srr_dist.export.nf4 import nf4_tensors
from srr_dist.pipeline.memory import layers_at_once
from srr_dist.pipeline.run import Run
from srr_dist.pipeline.two_sided import solve_gated
from srr_dist.solve import Grid, LayerSolution, Metric, Stored, remeasured, solve_layer
from srr_dist.threads import side_by_side


@dataclass(frozen=True)
class BlockSolver:
    """One block's layers, with what it takes to solve them.

    Attributes:
        run: selection and options.
        block: the block.
        weights: the source's tensors by name.
        moments: by the input's name, none where nothing is calibrated.
        device: where to compute.
    """

    run: Run
    block: Block
    weights: Mapping[str, Tensor]
    moments: dict[str, InputMoment]
    device: torch.device

    def solve(self, threads: int) -> dict[str, LayerSolution]:
        """Solve every selected layer on that many CPU threads; by name, in the block's order.

        Raises:
            CalibrationError: too many of a layer's input rows were NaN or Inf.
        """
        groups, found = shared_inputs(self.block, self.run.quantized), dict[str, LayerSolution]()
        at_once = layers_at_once(self.block, self.run.quantized, threads, on_gpu=self.device.type != "cpu")
        solve = self._solve_group
        for part in side_by_side(solve, groups, at_once) if at_once > 1 else map(solve, groups):  # on all threads
            found |= part
        return found

    def remeasure(
        self, solutions: Mapping[str, LayerSolution], changed: Mapping[str, Stored]
    ) -> dict[str, LayerSolution]:
        """What the solutions are once these are stored instead."""
        found = {}
        for group in shared_inputs(self.block, self.run.quantized):
            metric = self._metric(group[0])
            for name in (linear.name for linear in group):
                layer, grid = changed[name].to(self.device), self.run.grid_of(name)
                found[name] = remeasured(self._weight(name), metric, solutions[name], layer, grid).to("cpu")
        return found

    def _solve_group(self, group: list[Linear]) -> dict[str, LayerSolution]:
        """Solve layers that read one input."""
        metric, found = self._metric(group[0]), dict[str, LayerSolution]()
        moment = self.moments.get(group[0].input)
        for linear in group:
            name, solution = linear.name, self._solution(linear, metric)
            solution.result.update(
                block=self.block.index,
                type=name.removeprefix(f"{self.block.name}."),
                tokens=moment.tokens if moment else 0,
                excluded_rows=moment.excluded if moment else 0,
            )
            found[name] = solution.to("cpu")
        return found

    def _solution(self, linear: Linear, metric: Metric) -> LayerSolution:
        W = self._weight(linear.name)
        if self.run.config.rounding == "yaqa":
            return solve_gated(self.run, linear, W, metric)
        return solve_layer(W, metric, linear.name, self.run.solve_options(self.run.grid_of(linear.name)))

    def _weight(self, name: str) -> Tensor:
        return self.weights[f"{name}.weight"].to(self.device)

    def _metric(self, linear: Linear) -> Metric:
        moment = self.moments.get(linear.input)
        if moment is None:
            return Metric(torch.ones(linear.in_features, device=self.device))
        rows, allowed = moment.tokens + moment.excluded, self.run.config.max_bad_rows
        if moment.excluded > allowed * rows:
            raise CalibrationError(
                f"layer {linear.name}: {moment.excluded} of {rows} input rows hold NaN or Inf, allowed is a share of "
                f"{allowed}; check the model and --dtype {self.run.config.dtype}, or raise --max-bad-rows"
            )
        again = self.run.config.tune_steps > 0  # once tuned, layers are measured again
        value = moment.value() if again else moment.take()
        return Metric.of(value.to(self.device), self.run.config.shrinkage)


def result_tensors(solutions: Mapping[str, Stored], grid_of: Callable[[str], Grid]) -> dict[str, dict[str, Tensor]]:
    """What solved layers add to their block's files, ``base`` and ``adapter``; each has a grid of its own."""
    base, adapter = dict[str, Tensor](), dict[str, Tensor]()
    for name, solution in solutions.items():
        codes, scale, grid = solution.codes, solution.scale, grid_of(name)
        if grid.codebook:
            base |= nf4_tensors(name, codes, scale)
        else:
            base |= linear_tensors(name, codes, scale, grid.bits, grid.zero(codes))
        adapter |= adapter_tensors(name, solution.L, solution.R)
    return {"base": base, "adapter": adapter}
