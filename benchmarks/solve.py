"""Seconds and objective of one layer: the published way of solving it against this one, in one process.

Published (QERA, arXiv 2410.06040; SRR builds on it): float64 ``scipy.linalg.sqrtm`` of H, full SVD of ``(W − Q) S``,
solve with S. Ours: "low rank" is the same step, from H and W − Q to L and R; the others are ``solve_layer``, from H and
W to stored factors and all that a record holds (energy of the weight, objectives, singular values), with k = 0,
with the search and with the criterion. All take MXINT3 in blocks of 32 and r = 32. Objectives are ``tr(Δ H Δᵀ)`` before
any rounding of the factors, in percent of the published one's. ``OMP_NUM_THREADS`` sets the threads of both; on a busy
machine take one thread and its own clock:

    OMP_NUM_THREADS=1 python benchmarks/solve.py --clock processor_seconds
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import scipy.linalg
import torch
from torch import Tensor

from srr_dist.solve import Grid, LayerSolution, Metric, Quantizer, SolveOptions, make_grid, solve_layer
from srr_dist.solve.lowrank import block_size, leading_subspace, start_directions

SHAPES = ((576, 576), (576, 1536), (1536, 576), (4096, 4096))
RANK = 32
LOW_RANK = "low rank"
OURS = {"qer": ("qer", "search"), "search": ("srr", "search"), "criterion": ("srr", "criterion")}
ENOUGH_SECONDS = 20.0

T = TypeVar("T")


def published(W: Tensor, H: Tensor, Q: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L and R of QERA-exact in float64."""
    S = torch.from_numpy(scipy.linalg.sqrtm(H.numpy()).real.copy())
    U, sigma, Vh = torch.linalg.svd((W - Q).double() @ S, full_matrices=False)
    return U[:, :rank], torch.linalg.solve(S, (sigma[:rank, None] * Vh[:rank]).mT).mT  # S is symmetric


def low_rank(E: Tensor, H: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What ``published`` computes, by the library's own way."""
    metric = Metric.of(H)
    found = leading_subspace(E, metric, rank, start_directions(metric, block_size(E.shape[0], E.shape[1], rank)))
    return found.U, found.R


def ours(W: Tensor, H: Tensor, name: str, options: SolveOptions) -> LayerSolution:
    """The layer from its raw moment to what is stored."""
    return solve_layer(W, Metric.of(H), name, options)


def objective(delta: Tensor, H: Tensor) -> float:
    """``tr(Δ H Δᵀ)`` in float64."""
    return float(((delta @ H) * delta).sum())


def synthetic(m: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight and an input moment with the features of real ones.

    W: noise and a low-rank part with a decaying spectrum. H: eigenvalues by a power law over four decades and three
    massive directions, each almost along one channel, as residual streams have.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    decay = torch.arange(1, 65, dtype=torch.float64) ** -0.5
    W = 0.02 * (normal(m, n) + (normal(m, 64) * decay) @ normal(64, n) / 4)
    basis = torch.linalg.qr(normal(n, n))[0]
    H = (basis * torch.logspace(1, -3, n, dtype=torch.float64)) @ basis.mT
    for strength in (1e4, 1e3, 3e2):
        direction = 0.01 * normal(n)
        direction[int(torch.randint(n, (), generator=generator))] = 1.0
        H += strength * torch.outer(direction, direction)
    return W.float(), (H + H.mT) / 2


def cases(weights: Path | None, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, W (float32) and H (float64) of every layer to solve."""
    if weights is None:
        for m, n in SHAPES:
            yield f"synthetic {m}×{n}", *synthetic(m, n, seed)
        return
    W, H = torch.load(weights, weights_only=True)
    for name in W:
        yield name, W[name].float(), H[name].double()


def timed(function: Callable[[], T], repeats: int) -> tuple[T, dict[str, float]]:
    """The result and the medians over several calls (fewer where they take long): seconds and processor seconds."""
    wall: list[float] = []
    processor: list[float] = []
    while len(wall) < repeats and sum(wall) < ENOUGH_SECONDS:
        started, worked = time.perf_counter(), time.process_time()
        result = function()
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - worked)
    return result, {"seconds": median(wall), "processor_seconds": median(processor)}


def compare(name: str, W: Tensor, H: Tensor, grid: Grid, repeats: int) -> dict[str, Any]:
    """One row: both ways on one layer."""
    Q = grid.dequantize(*grid.quantize(W))
    quantizer = Quantizer(grid)
    solve_layer(W, Metric.of(H), name, SolveOptions("qer", quantizer, RANK))  # first calls pay for threads and memory
    (L, R), time_published = timed(partial(published, W, H, Q, RANK), repeats)
    reference = objective((W - Q).double() - L @ R, H)
    row: dict[str, Any] = {
        "layer": name,
        "shape": list(W.shape),
        "published": {**time_published, "objective": reference},
    }

    def note(label: str, time_ours: dict[str, float], found: float, k: int) -> None:
        faster = {f"{key}_ratio": time_published[key] / time_ours[key] for key in time_ours}
        row[label] = {**time_ours, **faster, "objective_percent": 100 * (found / reference - 1), "k": k}

    (L, R), time_ours = timed(partial(low_rank, W - Q, H, RANK), repeats)
    note(LOW_RANK, time_ours, objective((W - Q).double() - L.double() @ R.double(), H), 0)
    for label, (method, split) in OURS.items():
        options = SolveOptions(method, quantizer, RANK, split)
        solution, time_ours = timed(partial(ours, W, H, name, options), repeats)
        note(label, time_ours, solution.result["objective"]["chosen"], solution.result["k"])
    return row


def markdown(rows: list[dict[str, Any]], clock: str) -> str:
    """Seconds by a clock, how many times faster, and the objective relative to the published one's (k = 0)."""
    labels = [LOW_RANK, *OURS]
    headings = [f"{label} s | faster | objective %" for label in labels]
    lines = ["| " + " | ".join(["layer", "shape", "published s", *headings]) + " |", "|---|---|" + "---:|" * 13]
    for row in rows:
        cells = [row["layer"], "×".join(map(str, row["shape"])), f"{row['published'][clock]:.3f}"]
        for label in labels:
            part = row[label]
            cells += [f"{part[clock]:.3f}", f"{part[clock + '_ratio']:.0f}×", f"{part['objective_percent']:+.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a torch-saved pair of dicts W and H, instead of synthetic layers")
    parser.add_argument("--layers", default="", help="only layers whose name contains this")
    parser.add_argument("--repeats", type=int, default=5, help="calls of which the median is taken")
    parser.add_argument("--seed", type=int, default=0, help="seed of the synthetic layers")
    parser.add_argument(
        "--clock", choices=("seconds", "processor_seconds"), default="seconds", help="what the table shows"
    )
    parser.add_argument("--output", type=Path, help="also write the table and its circumstances as JSON")
    arguments = parser.parse_args()
    grid = make_grid("mxint", 3, 32)
    load = os.getloadavg()[0]
    rows = []
    for name, W, H in cases(arguments.weights, arguments.seed):
        if arguments.layers in name:
            rows.append(compare(name, W, H, grid, arguments.repeats))
            print(f"{name}: done", file=sys.stderr)
    circumstances = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_before": load,
        "clock": arguments.clock,
        "torch": torch.__version__,
        "scipy": scipy.__version__,
    }
    print(
        markdown(rows, arguments.clock) + "\n\n" + ", ".join(f"{key} {value}" for key, value in circumstances.items())
    )
    if arguments.output:
        arguments.output.write_text(json.dumps({"circumstances": circumstances, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
