"""The layers of one block, solved from their weights and moments.

A layer of a small model is too little work for several threads, so that on CPUs small layers are solved side by side,
each on one thread. A layer's bits do not depend on the number of threads, and the order of the results is the block's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
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


def solve_block(
    run: Run,
    block: Block,
    weights: Mapping[str, Tensor],
    moments: dict[str, InputMoment],
    device: torch.device,
    threads: int,
) -> Solved:
    """Solve every selected layer of a block.

    Args:
        run: selection and options.
        block: the block.
        weights: the source's tensors by name.
        moments: by the input's name; taken out as they are used, none where nothing is calibrated.
        device: where to compute.
        threads: CPU threads of this worker.

    Raises:
        CalibrationError: too many of a layer's input rows were NaN or Inf.
    """
    groups = shared_inputs(block, run.quantized)
    solve = partial(_solve_group, run, block, weights, moments, device)
    whole = Solved()
    at_once = side_by_side(block, run.quantized, threads, on_gpu=device.type != "cpu")
    for part in map(solve, groups) if at_once == 1 else _pooled(solve, groups, at_once, threads):
        whole.base |= part.base
        whole.adapter |= part.adapter
        whole.layers += part.layers
    return whole


def _pooled(solve: partial[Solved], groups: list[list[Linear]], at_once: int, threads: int) -> Iterator[Solved]:
    with ThreadPoolExecutor(at_once, initializer=_one_thread) as pool:
        yield from pool.map(solve, groups)
    torch.set_num_threads(threads)  # one of its settings belongs to the process


def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


def _solve_group(
    run: Run,
    block: Block,
    weights: Mapping[str, Tensor],
    moments: dict[str, InputMoment],
    device: torch.device,
    group: list[Linear],
) -> Solved:
    """Solve layers that read one input."""
    moment = moments.pop(group[0].input, None)
    metric = _metric(run, moment, group[0], device)
    found = Solved()
    for linear in group:
        solution = solve_layer(weights[f"{linear.name}.weight"].to(device), metric, linear.name, run.solve_options())
        found.base |= linear_tensors(linear.name, solution.codes.cpu(), solution.scale.cpu(), run.config.bits)
        found.adapter |= adapter_tensors(linear.name, solution.L.cpu(), solution.R.cpu())
        found.layers.append(
            solution.result
            | {
                "block": block.index,
                "type": linear.name.removeprefix(f"{block.name}."),
                "tokens": moment.tokens if moment else 0,
                "excluded_rows": moment.excluded if moment else 0,
            }
        )
    return found


def _metric(run: Run, moment: InputMoment | None, linear: Linear, device: torch.device) -> Metric:
    if moment is None:
        return Metric(torch.ones(linear.in_features, device=device))
    rows = moment.tokens + moment.excluded
    if moment.excluded > run.config.max_bad_rows * rows:
        raise CalibrationError(
            f"layer {linear.name}: {moment.excluded} of {rows} input rows hold NaN or Inf, allowed is a share of "
            f"{run.config.max_bad_rows}; check the model and --dtype {run.config.dtype}, or raise --max-bad-rows"
        )
    return Metric.of(moment.value().to(device), run.config.shrinkage)
