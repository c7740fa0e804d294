"""The widths that a number of bits is spent on best, by what a walk has left of a model's gradients."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping

from walk import Walk

from srr_dist.calibration.sketches import HeldOut
from srr_dist.checkpoint.graph import BlockGraph
from srr_dist.checkpoint.source import Checkpoint
from srr_dist.config import BITS
from srr_dist.solve import allocate, make_grid, width_errors


def mixed_widths(
    checkpoint: Checkpoint, graph: BlockGraph, walk: Walk, arguments: argparse.Namespace
) -> dict[float, dict[str, int]]:
    """For each of ``--mean-bits`` the bits of every layer's codes.

    They are written to the errors' stream as the rules of a run.
    """
    started = time.process_time()
    grids = {bits: make_grid(arguments.grid, bits, arguments.group_size) for bits in BITS}
    errors, sizes, inputs = dict[str, dict[int, float]](), dict[str, int](), dict[str, str]()
    for block in graph.blocks:
        weights, kept = checkpoint.read(block.tensors), walk.block(block.index)["held_out"]
        for linear in block.linears:
            W, name = weights[f"{linear.name}.weight"], linear.name
            errors[name] = width_errors(W, grids, "search", HeldOut.of(kept[name]))
            sizes[name], inputs[name] = W.numel(), linear.input
    leaders = inputs if arguments.together else None
    found = {mean_bits: allocate(errors, sizes, mean_bits, leaders) for mean_bits in arguments.mean_bits}
    print(f"weighed in {time.process_time() - started:.0f} s", file=sys.stderr)
    for mean_bits, widths in found.items():
        print(f"{mean_bits:g} bits: {_rules(widths)}", file=sys.stderr)
    return found


def _rules(widths: Mapping[str, int]) -> str:
    ((most, _),) = Counter(widths.values()).most_common(1)
    rules = (f"^{re.escape(layer)}$={bits}" for layer, bits in widths.items() if bits != most)
    return f"--bits {most} --widths '{' '.join(rules)}'"
