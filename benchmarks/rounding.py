"""Seconds of error feedback alone, and its objective: llm-compressor's GPTQ against ours, in one process.

Both get the same weight, moment, group scales, damping and activation order, and go from the moment to rounded weights.
Layers that read the same input share their factor here; llm-compressor factors for every layer, so that the factor's
seconds are shown by themselves. The environment of llm-compressor is made once, by ``peers.py``:

    OMP_NUM_THREADS=1 python benchmarks/rounding.py --folder /tmp/peers
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from srr_dist.solve.grids import make_grid
from srr_dist.solve.metric import Metric
from srr_dist.solve.rounding import DAMPING, gptq

ROOT = Path(__file__).parent.parent
SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048), (4096, 4096))
BITS, GROUP_SIZE = 3, 64

T = TypeVar("T")


def layer(m: int, n: int) -> tuple[Tensor, Tensor]:
    """A random weight, and a moment with eigenvalues by a power law over four decades."""
    generator = torch.Generator().manual_seed(m + n)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    H = (basis * torch.logspace(1, -3, n)) @ basis.mT
    return torch.randn(m, n, generator=generator), (H + H.mT) / 2


def theirs(W: Tensor, H: Tensor, scale: Tensor) -> Tensor:
    """llm-compressor's, ``[m, n]``."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    scheme = QuantizationArgs(num_bits=BITS, strategy="group", group_size=GROUP_SIZE, actorder="weight")
    zero = torch.zeros_like(scale, dtype=torch.int8)
    found: Tensor = quantize_weight(
        W[None].clone(), H[None].clone(), scale[None], zero[None], None, scheme, percdamp=DAMPING
    )[0]
    return found[0]


def timed(function: Callable[[], T], repeats: int) -> tuple[T, float]:
    """The result, and the median of its processor seconds."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        result = function()
        seconds.append(time.process_time() - started)
    return result, median(seconds)


def compare(m: int, n: int, repeats: int) -> dict[str, Any]:
    """One row."""
    W, H = layer(m, n)
    grid, metric = make_grid("int", BITS, GROUP_SIZE), Metric.of(H)
    scale = grid.scale(W)

    def objective(Q: Tensor) -> float:
        error = (W - Q).double()
        return float(((error @ H.double()) * error).sum())

    _, factor = timed(lambda: Metric.of(H).feedback, repeats)
    codes, rounding = timed(lambda: gptq(W, scale, grid, metric.feedback), repeats)
    Q, peer = timed(lambda: theirs(W, H, scale.float()), repeats)
    return {
        "layer": f"{m} × {n}",
        "llm-compressor": peer,
        "factor": factor,
        "rounding": rounding,
        "faster": peer / (factor + rounding),
        "objective": objective(grid.dequantize(codes, scale)) / objective(Q) - 1.0,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| layer | llm-compressor | our factor | our rounding | faster | objective |", "|---|" + "---:|" * 5]
    lines += [
        f"| {row['layer']} | {row['llm-compressor']:.3f} s | {row['factor']:.3f} s | {row['rounding']:.3f} s | "
        f"{row['faster']:.1f} × | {row['objective']:+.2%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where peers.py keeps its environments; without it, in this one")
    parser.add_argument("--repeats", type=int, default=5, help="calls of which the median is taken")
    parser.add_argument("--output", type=Path, help="also write the table and its circumstances as JSON")
    arguments = parser.parse_args()
    if arguments.folder:
        from peers import PEERS, environment

        python = environment(arguments.folder, "llm-compressor", PEERS["llm-compressor"].packages)
        command = [str(python), __file__, "--repeats", str(arguments.repeats)]
        command += ["--output", str(arguments.output)] if arguments.output else []
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        return
    for work in (theirs, lambda W, H, scale: gptq(W, scale, make_grid("int", BITS, GROUP_SIZE), Metric.of(H).feedback)):
        work(*layer(128, 128), torch.ones(128, 2, dtype=torch.bfloat16))  # first calls pay for threads and memory
    rows = [compare(m, n, arguments.repeats) for m, n in SHAPES]
    print(table(rows))
    if arguments.output:
        circumstances = {"threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
        arguments.output.write_text(json.dumps({"circumstances": circumstances, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
