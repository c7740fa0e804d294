"""Quality of every method at the same calibration and evaluation tokens: KL, perplexity, bits per weight.

Statistics come from the original model and blocks do not depend on each other's quantization, so one walk over the
blocks calibrates once, solves every recipe, and carries one stream of evaluation hidden states per recipe. The solver,
the moments and the comparison are the library's own; what differs from ``srr_dist.quantize`` is only that nothing is
stored.

    python benchmarks/quality.py --model M --calibration TEXT --text TEXT --bits 2 3 4 --output results/quality.json
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srr_dist.calibration import InputMoment
from srr_dist.calibration.adapted import attach_adapters
from srr_dist.calibration.block_error import OutputError
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block, build_graph
from srr_dist.checkpoint.source import open_checkpoint
from srr_dist.checkpoint.tokens import calibration_tokens, evaluation_tokens
from srr_dist.pipeline.comparison import Comparison, compare
from srr_dist.solve import (
    LayerSolution,
    Metric,
    Quantizer,
    SolveOptions,
    Stored,
    TuneOptions,
    layer_seed,
    make_grid,
    solve_layer,
    tune,
)


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    name: str
    options: SolveOptions
    scaling: str = "exact"
    shrinkage: float = 0.0
    tune_steps: int = 0


def recipes(bits: int, grid: str, group_size: int, rank: int, tune_steps: int) -> list[Recipe]:
    """The ladder from weights only to the best that is known, at one bit width."""
    base = make_grid(grid, bits, group_size)

    def recipe(
        name: str, method: str, *, scaling: str = "exact", shrinkage: float = 0.0, tuned: int = 0, **choices: Any
    ) -> Recipe:
        quantizer = Quantizer(base, choices.pop("scales", "absmax"), choices.pop("rounding", "nearest"))
        options = SolveOptions(method, quantizer, 0 if method == "none" else rank, **choices)
        return Recipe(f"{grid}{bits} {name}", options, scaling, shrinkage, tuned)

    criterion: dict[str, Any] = {"split": "criterion"}
    searched: dict[str, Any] = {"scales": "search"}
    shrunk: dict[str, Any] = searched | {"shrinkage": 0.1}
    fed: dict[str, Any] = shrunk | {"rounding": "gptq"}
    again: dict[str, Any] = {"iterations": 3}
    beyond: dict[str, Any] = fed | again | {"rounding_metric": "downdated"}
    return [
        recipe("weights only", "none"),
        recipe("LQER", "qer", scaling="lqer"),
        recipe("QER-exact", "qer"),
        recipe("SRR criterion, split form", "srr", **criterion, form="split"),
        recipe("SRR criterion", "srr", **criterion),
        recipe("SRR search", "srr"),
        recipe("weights only + scales", "none", **searched),
        recipe("weights only + scales, λ, GPTQ", "none", **fed),
        recipe("QER-exact + scales, λ, GPTQ", "qer", **fed),
        recipe("SRR criterion + scales", "srr", **criterion, **searched),
        recipe("SRR criterion + scales, λ", "srr", **criterion, **shrunk),
        recipe("SRR criterion + scales, λ, iterations", "srr", **criterion, **shrunk, **again),
        recipe("SRR criterion + scales, λ, iterations, GPTQ", "srr", **criterion, **fed, **again),
        recipe("SRR criterion + scales, λ, iterations, GPTQ, downdated", "srr", **criterion, **beyond),
        recipe("QER-exact + scales, λ, iterations, GPTQ, downdated", "qer", **beyond),
        recipe("SRR search + scales, λ, iterations, GPTQ, downdated", "srr", **beyond),
        recipe(f"SRR criterion, all that, {tune_steps} steps", "srr", **criterion, **beyond, tuned=tune_steps),
    ]


class Row:
    """A recipe's evaluation stream and what its layers reported."""

    def __init__(self, recipe: Recipe, hidden: list[Tensor]) -> None:
        self.recipe, self.hidden = recipe, list(hidden)
        self.seconds, self.tuning, self.stored, self.weights, self.relative = 0.0, 0.0, 0.0, 0, [0.0]
        self.scores: list[Comparison] = []

    def solve(
        self, block: Block, weights: dict[str, Tensor], metrics: dict[tuple[str, str, float], Metric]
    ) -> dict[str, LayerSolution]:
        solutions, recipe = {}, self.recipe
        for linear in block.linears:
            W = weights[f"{linear.name}.weight"]
            started = time.perf_counter()
            metric = metrics[linear.input, recipe.scaling, recipe.shrinkage]
            solution = solve_layer(W, metric, linear.name, recipe.options)
            self.seconds += time.perf_counter() - started
            self.stored += solution.result["bits_per_weight"] * W.numel()
            self.weights += W.numel()
            self.relative.append(solution.result["objective"]["stored"] / solution.result["energy"])
            solutions[linear.name] = solution
        return solutions

    def tune(
        self,
        decoder: Decoder,
        block: Block,
        weights: dict[str, Tensor],
        solutions: Mapping[str, Stored],
        inputs: list[Tensor],
        targets: list[Tensor],
    ) -> Mapping[str, Stored]:
        """The block tuned, where the recipe says so, towards the original's outputs for these inputs."""
        if not self.recipe.tune_steps:
            return solutions
        started = time.perf_counter()
        decoder.load_block(block.index, weights)
        decoder.run_block(block.index, inputs[0])  # records its call before threads ask for it
        error = OutputError(
            partial(decoder.run_block, block.index),
            decoder.linear_modules(block.index),
            inputs.__getitem__,
            targets.__getitem__,
            torch.get_num_threads(),
        )
        W = {name: weights[f"{name}.weight"] for name in solutions}
        options = TuneOptions(self.recipe.tune_steps, seed=layer_seed(0, block.name))
        found = tune(W, solutions, self.recipe.options.quantizer.grid, error, len(inputs), options)
        self.tuning += time.perf_counter() - started
        return found.layers

    def figures(self, kl_sequences: int) -> dict[str, float | str]:
        total = sum(self.scores, Comparison())
        return {
            "recipe": self.recipe.name,
            "bits_per_weight": self.stored / self.weights,
            **total.figures(),
            f"kl_{kl_sequences}": sum(self.scores[:kl_sequences], Comparison()).figures()["kl"],
            "mean_relative_objective": sum(self.relative) / (len(self.relative) - 1),
            "solve_seconds": self.seconds,
            "tune_seconds": self.tuning,
        }


def calibrate(
    decoder: Decoder, block: Block, hidden: list[Tensor], kinds: set[tuple[str, float]]
) -> tuple[list[Tensor], dict[tuple[str, str, float], Metric]]:
    """Pass the calibration sequences through a block; its outputs, and a metric per shared input and kind.

    A kind is a scaling and a shrinkage.
    """
    scalings = {scaling for scaling, _ in kinds}
    inputs = {linear.input: linear.in_features for linear in block.linears}
    moments = {(name, scaling): InputMoment(width, scaling) for name, width in inputs.items() for scaling in scalings}
    modules = decoder.linear_modules(block.index)
    handles = []
    for name in inputs:

        def add(module: torch.nn.Module, args: tuple[Tensor], name: str = name) -> None:
            for scaling in scalings:
                moments[name, scaling].update(args[0][0])

        handles.append(modules[name].register_forward_pre_hook(add))
    out = [decoder.run_block(block.index, h) for h in hidden]
    for handle in handles:
        handle.remove()
    return out, {
        (name, scaling, shrinkage): Metric.of(moments[name, scaling].value(), shrinkage)
        for name in inputs
        for scaling, shrinkage in kinds
    }


def run(arguments: argparse.Namespace) -> list[dict[str, float | str]]:
    checkpoint = open_checkpoint(arguments.model)
    graph, tokenizer = build_graph(checkpoint), checkpoint.tokenizer()
    vocab = checkpoint.config.get_text_config().vocab_size
    calibration = calibration_tokens(
        arguments.calibration,
        tokenizer,
        num_samples=arguments.num_samples,
        seq_len=arguments.seq_len,
        seed=0,
        vocab_size=vocab,
    )
    text = evaluation_tokens(
        arguments.text, tokenizer, num_samples=arguments.eval_samples, seq_len=arguments.seq_len, vocab_size=vocab
    )
    decoder, other = (Decoder(checkpoint, dtype=torch.float32) for _ in range(2))
    decoder.load_embedding()
    hidden = [decoder.embed(row[None]) for row in calibration.ids]
    original = [decoder.embed(row[None]) for row in text.ids]
    decoder.drop_rest()
    rows = [
        Row(recipe, original)
        for bits in arguments.bits
        for recipe in recipes(bits, arguments.grid, arguments.group_size, arguments.rank, arguments.tune_steps)
        if any(word in recipe.name for word in arguments.only)
    ]
    kinds = {(row.recipe.scaling, row.recipe.shrinkage) for row in rows}
    for block in graph.blocks:
        started = time.perf_counter()
        weights = checkpoint.read(block.tensors)
        decoder.load_block(block.index, weights)
        inputs = hidden
        hidden, metrics = calibrate(decoder, block, inputs, kinds)
        original = [decoder.run_block(block.index, h) for h in original]
        decoder.drop_block(block.index)
        for row in rows:
            solutions = row.tune(other, block, weights, row.solve(block, weights, metrics), inputs, hidden)
            quantized = {
                f"{name}.weight": row.recipe.options.quantizer.grid.dequantize(s.codes, s.scale)
                for name, s in solutions.items()
            }
            module = other.load_block(block.index, weights | quantized)
            factors = {name: (s.L, s.R) for name, s in solutions.items() if s.L.shape[1]}
            attach_adapters(module, other.linear_modules(block.index), factors)
            row.hidden = [other.run_block(block.index, h) for h in row.hidden]
        other.drop_block(block.index)
        print(f"block {block.index} {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    decoder.load_head()
    for sequence, ids in enumerate(text.ids):
        logits = decoder.logits(original[sequence])[0]
        for row in rows:
            row.scores.append(compare(logits, decoder.logits(row.hidden[sequence])[0], ids))
    return [row.figures(arguments.kl_samples) for row in rows]


def table(rows: list[dict[str, float | str]], kl_samples: int) -> str:
    lines = [
        f"| recipe | bits per weight | KL ({kl_samples} sequences) | KL | perplexity | top-1 agreement | "
        "mean relative objective | solve, s | tune, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['recipe']} | {row['bits_per_weight']:.2f} | {row[f'kl_{kl_samples}']:.3f} | {row['kl']:.3f} | "
        f"{row['perplexity']:.1f} | {row['top1_agreement']:.3f} | {row['mean_relative_objective']:.4f} | "
        f"{row['solve_seconds']:.0f} | {row['tune_seconds']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--eval-samples", type=int, default=8, help="sequences for every figure")
    parser.add_argument("--kl-samples", type=int, default=4, help="KL over the first of them as well")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--grid", default="mxint")
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--tune-steps", type=int, default=24, help="of the recipe that is tuned")
    parser.add_argument("--only", nargs="+", default=[""], help="recipes whose name holds one of these")
    parser.add_argument("--output", type=Path, help="JSON with the figures, the versions and the machine")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = run(arguments)
    print(f"perplexity of the original: {rows[0]['perplexity_original']:.2f}\n")
    print(table(rows, arguments.kl_samples))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        machine = {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
        options = {key: str(value) for key, value in vars(arguments).items()}
        arguments.output.write_text(
            json.dumps({"options": options, "torch": torch.__version__, "machine": machine, "rows": rows}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
