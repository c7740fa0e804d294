"""KL of rounding against the network's output beside the same recipes for each layer's own output, at equal tokens.

Moments and sketches are collected once, after each of ``--sequences``. From them, layers are solved for their inputs,
from their sketch, and with the gate that the library has between the two; all of these models are compared with the
original on held-out text. With ``--mean-bits`` layers differ in width; the rules that have been found are written to
the errors' stream as a run takes them. Sketches, gate and solver are the library's own; what differs from
``srr_dist.quantize`` is only that nothing is committed.

    python benchmarks/yaqa.py --model M --calibration TEXT --text TEXT --folder yaqa --bits 2 3 4 --sequences 64 1024
    python benchmarks/yaqa.py --model M --calibration TEXT --text TEXT --folder yaqa --rank 0 --mean-bits 3.25
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from curves import mixed_widths
from rows import Original, Row, columns, load_stored, score, show
from torch import Tensor
from walk import Walk

from srr_dist.calibration import first_token_weight
from srr_dist.calibration.sketches import HeldOut, output_bands
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block, BlockGraph, build_graph
from srr_dist.checkpoint.rotation import rotated
from srr_dist.checkpoint.source import Checkpoint, open_checkpoint
from srr_dist.checkpoint.tokens import calibration_tokens, evaluation_tokens
from srr_dist.solve import (
    ONE_SIDED,
    TWO_SIDED,
    Grid,
    LayerSolution,
    Metric,
    Quantizer,
    SolveOptions,
    gate,
    make_grid,
    sketch_metric,
    solve_layer,
)


@dataclass(frozen=True)
class Recipe:
    """What is solved for inputs, from sketches, and with the gate."""

    name: str
    options: SolveOptions
    shrinkage: float
    sketch: str
    sequences: int
    band: int
    widths: Mapping[str, int] = field(default_factory=dict)
    """Of layers that have others than the quantizer's own."""

    def options_of(self, layer: str) -> SolveOptions:
        """Those of a layer."""
        quantizer = self.options.quantizer
        grid = replace(quantizer.grid, bits=self.widths.get(layer, quantizer.grid.bits))
        return replace(self.options, quantizer=replace(quantizer, grid=grid))

    def grid_of(self, layer: str) -> Grid:
        """That of a layer."""
        return self.options_of(layer).quantizer.grid

    def metric(self, sides: dict[str, Tensor], inputs: Metric) -> Metric:
        """That of a sketch whose output sides were summed whole: of bands they would be the blocks on the diagonal."""
        return sketch_metric(
            {side: H if side == "input" else self._in_bands(H) for side, H in sides.items()}, inputs, self.shrinkage
        )

    def _in_bands(self, H: Tensor) -> Tensor:
        if H.dim() < 2 or (bands := output_bands(len(H), self.band)) == 1:
            return H
        return torch.stack([rows.chunk(bands, dim=1)[band] for band, rows in enumerate(H.chunk(bands))])


GATED = "gated"


def recipes(arguments: argparse.Namespace, mixed: Mapping[float, Mapping[str, int]]) -> list[Recipe]:
    """Without an adapter and with one, for every width; fewer sequences for the curve's width alone.

    Where there are any, ``mixed`` widths of layers, by their mean, take the place of ``--bits``.
    """
    found = []
    bits_of_codes, kinds = mixed or arguments.bits, arguments.sketch
    choices = product(bits_of_codes, arguments.rank, arguments.descent, arguments.shrinkage, kinds, arguments.sequences)
    for bits, rank, descent, shrinkage, sketch, sequences in choices:
        if sequences < max(arguments.sequences) and (rank or bits != arguments.curve_bits):
            continue
        quantizer = Quantizer(make_grid(arguments.grid, int(bits), arguments.group_size), "search", "yaqa")
        adapter: dict[str, Any] = {"iterations": 3, "rounding_metric": "downdated"} if rank else {}
        options = SolveOptions("srr" if rank else "none", quantizer, rank, "criterion", descent=descent, **adapter)
        shape = f"{arguments.grid}{bits:g} g{arguments.group_size}" + (f" r{rank}" if rank else "")
        shape += ", widths by input" if mixed and arguments.together else ""
        shape += f", descent {descent}" if descent else ""
        name = f"{shape}, λ = {shrinkage:g}, {sketch} of {sequences}"
        name += f", bands of {arguments.sketch_band}" if arguments.sketch_band else ""
        widths = mixed.get(bits, {})
        found.append(Recipe(name, options, shrinkage, sketch, sequences, arguments.sketch_band, widths))
    return found


class SidedRow(Row):
    """One of a recipe's three models, whose layers are kept as they were solved."""

    def __init__(self, recipe: Recipe, side: str) -> None:
        super().__init__(f"{recipe.name}: {side}", [])
        self._grid_of = recipe.grid_of
        self._solutions: dict[str, LayerSolution] = {}
        self._chosen: Counter[str] = Counter()
        self._seconds = self._stored = 0.0
        self._weights = 0

    def keep(self, solution: LayerSolution, seconds: float, chosen: str) -> None:
        m, n = solution.result["shape"]
        self._solutions[solution.result["name"]] = solution
        self._stored += solution.result["bits_per_weight"] * m * n
        self._weights += m * n
        self._seconds += seconds
        self._chosen[chosen] += 1

    def load(self, decoder: Decoder, original: Original) -> None:
        stored = {linear.name: self._solutions[linear.name] for linear in original.block.linears}
        load_stored(decoder, original.block, original.weights, stored, self._grid_of)

    def costs(self) -> dict[str, float]:
        share = self._chosen[TWO_SIDED] / self._chosen.total()
        return {"bits_per_weight": self._stored / self._weights, "seconds": self._seconds, "two_sided": share}


def solve(
    recipe: Recipe, block: Block, weights: dict[str, Tensor], left: dict[str, Any], rows: dict[str, SidedRow]
) -> None:
    """Solve a block under a recipe for all of its three rows, from what the walk has left of it."""
    sums = left[str(recipe.sequences)]
    metrics = {name: Metric.of(H, recipe.shrinkage) for name, H in sums["moments"].items()}
    for linear in block.linears:
        W, name, inputs = weights[f"{linear.name}.weight"], linear.name, metrics[linear.input]
        metric = recipe.metric(sums["sketches"][name][recipe.sketch], inputs)
        found: dict[str, tuple[LayerSolution, float]] = {}
        for side, its_metric in ((ONE_SIDED, inputs), (TWO_SIDED, metric)):
            started = time.process_time()
            found[side] = solve_layer(W, its_metric, name, recipe.options_of(name)), time.process_time() - started
        errors = {side: W.float() - solution.weight(recipe.grid_of(name)) for side, (solution, _) in found.items()}
        choice = gate(errors, metric, HeldOut.of(left["held_out"][name]))
        for side, (solution, seconds) in found.items():
            rows[side].keep(solution, seconds, side)
        rows[GATED].keep(found[choice["chosen"]][0], sum(seconds for _, seconds in found.values()), choice["chosen"])
        print(json.dumps({"layer": name, "recipe": recipe.name, **choice}), file=sys.stderr)


def compare_rows(checkpoint: Checkpoint, graph: BlockGraph, text: Tensor, rows: list[SidedRow]) -> None:
    """Pass the evaluation text ``[N, T]`` through the original and all rows, and compare what comes out."""
    decoder, other = (Decoder(checkpoint, dtype=torch.float32) for _ in range(2))
    decoder.load_embedding()
    hidden = [decoder.embed(row[None]) for row in text]
    for row in rows:
        row.hidden = list(hidden)
    for block in graph.blocks:
        weights = checkpoint.read(block.tensors)
        decoder.load_block(block.index, weights)
        hidden = [decoder.run_block(block.index, state) for state in hidden]
        decoder.drop_block(block.index)
        for row in rows:
            row.advance(other, Original(block, weights, {}, [], []))
        print(f"compared behind block {block.index}", file=sys.stderr, flush=True)
    score(decoder, hidden, text, rows)


def run(arguments: argparse.Namespace) -> list[dict[str, float | str]]:
    checkpoint = open_checkpoint(arguments.model)
    if arguments.incoherence:
        checkpoint = rotated(checkpoint, arguments.seed)
    graph, vocabulary = build_graph(checkpoint), checkpoint.config.get_text_config().vocab_size
    most = max(arguments.sequences)
    ids = calibration_tokens(
        arguments.calibration,
        checkpoint.tokenizer(),
        num_samples=most + arguments.held_out,
        seq_len=arguments.seq_len,
        seed=arguments.seed,
        vocab_size=vocabulary,
    ).ids
    text = evaluation_tokens(
        arguments.text,
        checkpoint.tokenizer(),
        num_samples=arguments.eval_samples,
        seq_len=arguments.eval_len,
        vocab_size=vocabulary,
    )
    decoder = Decoder(checkpoint, dtype=torch.float32)
    kinds, counts = sorted(set(arguments.sketch)), sorted(set(arguments.sequences))
    first = first_token_weight(arguments.first_token_share, arguments.seq_len)
    walk = Walk(decoder, graph, ids, arguments.held_out, counts, kinds, first, arguments.folder)
    walk.collect()
    if arguments.collect:
        return []
    chosen = recipes(arguments, mixed_widths(checkpoint, graph, walk, arguments) if arguments.mean_bits else {})
    rows = {recipe.name: {s: SidedRow(recipe, s) for s in (ONE_SIDED, TWO_SIDED, GATED)} for recipe in chosen}
    for block in graph.blocks:
        weights, left = checkpoint.read(block.tensors), walk.block(block.index)
        for recipe in chosen:
            solve(recipe, block, weights, left, rows[recipe.name])
    flat = [row for three in rows.values() for row in three.values()]
    compare_rows(checkpoint, graph, text.ids, flat)
    return [row.figures(arguments.kl_samples) for row in flat]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--incoherence", action="store_true", help="rotate first; wants a --folder of its own")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1024], help="fewer than the most: one width alone")
    parser.add_argument("--held-out", type=int, default=64, help="sequences for the gate")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--first-token-share", type=float, default=0.03, help="of its sequence, in moments")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of calibration sequences")
    parser.add_argument("--sketch", nargs="+", default=["B"])
    parser.add_argument("--sketch-band", type=int, default=0, help="most outputs of a block of the output side")
    parser.add_argument("--folder", type=Path, required=True, help="where moments and sketches are kept, for more rows")
    parser.add_argument("--collect", action="store_true", help="fill the folder, and stop")
    parser.add_argument("--eval-samples", type=int, default=8, help="sequences for every figure")
    parser.add_argument("--eval-len", type=int, default=1024)
    parser.add_argument("--kl-samples", type=int, default=4, help="KL over the first of them as well")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--mean-bits", type=float, nargs="+", default=[], help="of codes, instead of one width")
    parser.add_argument("--together", action="store_true", help="one width for layers of one input, as vLLM wants it")
    parser.add_argument("--curve-bits", type=int, default=3, help="width of the rows with fewer sequences")
    parser.add_argument("--grid", default="int")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rank", type=int, nargs="+", default=[0, 6], help="0 for no adapter")
    parser.add_argument("--descent", type=int, nargs="+", default=[0, 3], help="times that codes and scales descend")
    parser.add_argument("--shrinkage", type=float, nargs="+", default=[0.1], help="of both sides")
    parser.add_argument("--output", type=Path, help="JSON with the figures, the versions and the machine")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = run(arguments)
    if not rows:
        return
    more = {"two-sided layers": ("two_sided", ".2f"), "seconds": ("seconds", ".0f")}
    show(rows, columns(arguments.kl_samples) | more, arguments)


if __name__ == "__main__":
    main()
