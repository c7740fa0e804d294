"""The layers of one block, solved from their weights and moments.

A layer of a small model is too little work for several threads, so that on CPUs small layers are solved side by side,
each on one thread. A layer's bits do not depend on the number of threads, and the order of the results is the block's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from srr_dist.calibration import InputMoment
from srr_dist.checkpoint.graph import Block, Linear
from srr_dist.errors import CalibrationError
from srr_dist.export.adapter import adapter_tensors
from srr_dist.export.base import linear_tensors
from srr_dist.pipeline.memory import side_by_side
from srr_dist.pipeline.run import Run
from srr_dist.solve import Metric, solve_layer


@dataclass
class Solved:
    """What layers are stored as: tensors of ``base`` and ``adapter`` by name, and the layers' records."""

    base: dict[str, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)


def shared_inputs(block: Block, quantized: frozenset[str]) -> list[list[Linear]]:
    """The block's layers to solve, grouped by the input they read."""
    groups: dict[str, list[Linear]] = {}
    for linear in block.linears:
        if linear.name in quantized:
            groups.setdefault(linear.input, []).append(linear)
    return list(groups.values())


@dataclass(frozen=True)
class BlockSolver:
    """One block's layers, with what it takes to solve them.

    Attributes:
        run: selection and options.
        block: the block.
        weights: the source's tensors by name.
        moments: by the input's name; taken out as they are used, none where nothing is calibrated.
        device: where to compute.
    """

    run: Run
    block: Block
    weights: Mapping[str, Tensor]
    moments: dict[str, InputMoment]
    device: torch.device

    def solve(self, threads: int) -> Solved:
        """Solve every selected layer on that many CPU threads.

        Raises:
            CalibrationError: too many of a layer's input rows were NaN or Inf.
        """
        groups, whole = shared_inputs(self.block, self.run.quantized), Solved()
        at_once = side_by_side(self.block, self.run.quantized, threads, on_gpu=self.device.type != "cpu")
        for part in map(self._solve_group, groups) if at_once == 1 else self._pooled(groups, at_once, threads):
            whole.base |= part.base
            whole.adapter |= part.adapter
            whole.layers += part.layers
        return whole

    def _pooled(self, groups: list[list[Linear]], at_once: int, threads: int) -> Iterator[Solved]:
        with ThreadPoolExecutor(at_once, initializer=_one_thread) as pool:
            yield from pool.map(self._solve_group, groups)
        torch.set_num_threads(threads)  # one of its settings belongs to the process

    def _solve_group(self, group: list[Linear]) -> Solved:
        """Solve layers that read one input."""
        moment = self.moments.pop(group[0].input, None)
        metric, found = self._metric(moment, group[0]), Solved()
        for linear in group:
            W = self.weights[f"{linear.name}.weight"].to(self.device)
            solution = solve_layer(W, metric, linear.name, self.run.solve_options())
            found.base |= linear_tensors(linear.name, solution.codes.cpu(), solution.scale.cpu(), self.run.config.bits)
            found.adapter |= adapter_tensors(linear.name, solution.L.cpu(), solution.R.cpu())
            found.layers.append(
                solution.result
                | {
                    "block": self.block.index,
                    "type": linear.name.removeprefix(f"{self.block.name}."),
                    "tokens": moment.tokens if moment else 0,
                    "excluded_rows": moment.excluded if moment else 0,
                }
            )
        return found

    def _metric(self, moment: InputMoment | None, linear: Linear) -> Metric:
        if moment is None:
            return Metric(torch.ones(linear.in_features, device=self.device))
        rows, allowed = moment.tokens + moment.excluded, self.run.config.max_bad_rows
        if moment.excluded > allowed * rows:
            raise CalibrationError(
                f"layer {linear.name}: {moment.excluded} of {rows} input rows hold NaN or Inf, allowed is a share of "
                f"{allowed}; check the model and --dtype {self.run.config.dtype}, or raise --max-bad-rows"
            )
        return Metric.of(moment.value().to(self.device), self.run.config.shrinkage)


def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
