"""The rows of ``quality.py``: recipes of ours, and what peers have left in folders."""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor

from srr_dist.calibration import InputMoment
from srr_dist.calibration.adapted import attach_adapters
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block
from srr_dist.pipeline.comparison import Comparison, compare
from srr_dist.pipeline.tuning import loaded_block_error
from srr_dist.seeds import layer_seed
from srr_dist.solve import (
    Grid,
    LayerSolution,
    Metric,
    Quantizer,
    SolveOptions,
    Stored,
    TuneOptions,
    make_grid,
    solve_layer,
    tune,
)

USUAL_SHRINKAGE = 0.1
"""Named in a row only where it is another."""


class Kind(NamedTuple):
    """Of a metric: which moment, shrunk how far, and how many tokens a sequence's first one counts for in it."""

    scaling: str
    shrinkage: float
    first: int


@dataclass(frozen=True)
class Recipe:
    """One row of the table."""

    name: str
    options: SolveOptions
    kind: Kind
    tune_steps: int = 0
    tune_batch: int = 4


def recipes(
    bits: int,
    grid: str,
    group_size: int,
    rank: int,
    shrinkage: float,
    first: int,
    tune_steps: Sequence[int],
    tune_batch: int,
) -> list[Recipe]:
    """The ladder from weights only to the best that is known, at one bit width, group size, rank and so on."""
    base = make_grid(grid, bits, group_size)

    def recipe(
        name: str, method: str, *, scaling: str = "exact", shrinkage: float = 0.0, tuned: int = 0, **choices: Any
    ) -> Recipe:
        quantizer = Quantizer(base, choices.pop("scales", "absmax"), choices.pop("rounding", "nearest"))
        options = SolveOptions(method, quantizer, 0 if method == "none" else rank, **choices)
        shape = f"{grid if base.codebook else f'{grid}{bits}'} g{group_size}" + (f" r{rank}" if options.rank else "")
        if shrinkage not in (0.0, USUAL_SHRINKAGE):
            name = f"{name}, λ = {shrinkage:g}"
        if first > 1:
            name = f"{name}, first × {first}"
        return Recipe(f"{shape} {name}", options, Kind(scaling, shrinkage, first), tuned, tune_batch)

    criterion: dict[str, Any] = {"split": "criterion"}
    searched: dict[str, Any] = {"scales": "search"}
    shrunk: dict[str, Any] = searched | {"shrinkage": shrinkage}
    fed: dict[str, Any] = shrunk | {"rounding": "gptq"}
    again: dict[str, Any] = {"iterations": 3}
    beyond: dict[str, Any] = fed | again | {"rounding_metric": "downdated"}
    last: dict[str, Any] = beyond | {"descent": 3}
    return [
        recipe("weights only", "none"),
        recipe("LQER", "qer", scaling="lqer"),
        recipe("QER-exact", "qer"),
        recipe("SRR criterion, split form", "srr", **criterion, form="split"),
        recipe("SRR criterion", "srr", **criterion),
        recipe("SRR search", "srr"),
        recipe("weights only + scales", "none", **searched),
        recipe("weights only + scales, λ, GPTQ", "none", **fed),
        recipe("weights only + scales, λ, GPTQ, descent", "none", **fed, descent=3),
        recipe("QER-exact + scales, λ, GPTQ", "qer", **fed),
        recipe("SRR criterion + scales", "srr", **criterion, **searched),
        recipe("SRR criterion + scales, λ", "srr", **criterion, **shrunk),
        recipe("SRR criterion + scales, λ, iterations", "srr", **criterion, **shrunk, **again),
        recipe("SRR criterion + scales, λ, iterations, GPTQ", "srr", **criterion, **fed, **again),
        recipe("SRR criterion + scales, λ, iterations, GPTQ, downdated", "srr", **criterion, **beyond),
        recipe("QER-exact + scales, λ, iterations, GPTQ, downdated", "qer", **beyond),
        recipe("SRR search + scales, λ, iterations, GPTQ, downdated", "srr", **beyond),
        recipe("QER-exact + scales, λ, iterations, GPTQ, downdated, descent", "qer", **last),
        recipe("SRR criterion + scales, λ, iterations, GPTQ, downdated, descent", "srr", **criterion, **last),
        recipe("SRR search + scales, λ, iterations, GPTQ, downdated, descent", "srr", **last),
        *(recipe(f"SRR criterion, all that, {n} steps", "srr", **criterion, **last, tuned=n) for n in tune_steps),
    ]


@dataclass(frozen=True)
class Original:
    """A block of the original model, and its hidden states and metrics for the calibration sequences."""

    block: Block
    weights: dict[str, Tensor]
    metrics: dict[tuple[str, Kind], Metric]
    """By shared input."""
    inputs: list[Tensor]
    outputs: list[Tensor]


def calibrate(
    decoder: Decoder, block: Block, hidden: list[Tensor], kinds: set[Kind]
) -> tuple[list[Tensor], dict[tuple[str, Kind], Metric]]:
    """Pass the calibration sequences through a block; its outputs, and a metric per shared input and kind."""
    inputs = {linear.input: linear.in_features for linear in block.linears}
    summed = {kind._replace(shrinkage=0.0) for kind in kinds}
    moments = {(name, kind): InputMoment(width, kind.scaling) for name, width in inputs.items() for kind in summed}
    modules = decoder.linear_modules(block.index)
    handles = []
    for name in inputs:

        def add(module: torch.nn.Module, args: tuple[Tensor], name: str = name) -> None:
            for kind in summed:
                moments[name, kind].update(args[0][0], kind.first)

        handles.append(modules[name].register_forward_pre_hook(add))
    out = [decoder.run_block(block.index, h) for h in hidden]
    for handle in handles:
        handle.remove()
    return out, {
        (name, kind): Metric.of(moments[name, kind._replace(shrinkage=0.0)].value(), kind.shrinkage)
        for name in inputs
        for kind in kinds
    }


class Row:
    """One stream of evaluation hidden states, and how far its logits are from the original's."""

    def __init__(self, name: str, hidden: list[Tensor]) -> None:
        self.name, self.hidden = name, list(hidden)
        self.scores: list[Comparison] = []

    def advance(self, decoder: Decoder, original: Original) -> None:
        """Pass the evaluation sequences through this row's version of a block."""
        index = original.block.index
        self.load(decoder, original)
        self.hidden = [decoder.run_block(index, h) for h in self.hidden]
        decoder.drop_block(index)

    def load(self, decoder: Decoder, original: Original) -> None:
        """Have the decoder hold this row's version of a block."""
        raise NotImplementedError

    def costs(self) -> dict[str, float]:
        """Bits per weight, seconds and what else is known."""
        raise NotImplementedError

    def figures(self, kl_sequences: int) -> dict[str, float | str]:
        """Everything the table has, by name."""
        total = sum(self.scores, Comparison())
        some = sum(self.scores[:kl_sequences], Comparison())
        return {"recipe": self.name, **self.costs(), **total.figures(), f"kl_{kl_sequences}": some.figures()["kl"]}


def load_stored(
    decoder: Decoder,
    block: Block,
    weights: dict[str, Tensor],
    stored: Mapping[str, Stored],
    grid_of: Callable[[str], Grid],
) -> None:
    """Have the decoder hold a block with these layers, each on its grid, in the place of its own."""
    quantized = {f"{name}.weight": grid_of(name).dequantize(layer.codes, layer.scale) for name, layer in stored.items()}
    module = decoder.load_block(block.index, weights | quantized)
    factors = {name: (layer.L, layer.R) for name, layer in stored.items() if layer.L.shape[1]}
    attach_adapters(module, decoder.linear_modules(block.index), factors)


class SolvedRow(Row):
    """A recipe of ours, solved block by block."""

    def __init__(self, recipe: Recipe, hidden: list[Tensor]) -> None:
        super().__init__(recipe.name, hidden)
        self.recipe = recipe
        self.solving, self.tuning, self.stored, self.weights = 0.0, 0.0, 0.0, 0
        self.relative: list[float] = []

    def load(self, decoder: Decoder, original: Original) -> None:
        stored: Mapping[str, Stored] = self._solve(original)
        if self.recipe.tune_steps:
            stored = self._tune(decoder, original, stored)
        grid = self.recipe.options.quantizer.grid
        load_stored(decoder, original.block, original.weights, stored, lambda _: grid)

    def costs(self) -> dict[str, float]:
        return {
            "bits_per_weight": self.stored / self.weights,
            "mean_relative_objective": sum(self.relative) / len(self.relative),
            "seconds": self.solving + self.tuning,
            "tune_seconds": self.tuning,
        }

    def _solve(self, original: Original) -> dict[str, LayerSolution]:
        solutions, recipe = {}, self.recipe
        started = time.perf_counter()
        for linear in original.block.linears:
            W = original.weights[f"{linear.name}.weight"]
            metric = original.metrics[linear.input, recipe.kind]
            solution = solve_layer(W, metric, linear.name, recipe.options)
            self.stored += solution.result["bits_per_weight"] * W.numel()
            self.weights += W.numel()
            self.relative.append(solution.result["objective"]["stored"] / solution.result["energy"])
            solutions[linear.name] = solution
        self.solving += time.perf_counter() - started
        return solutions

    def _tune(self, decoder: Decoder, original: Original, starts: Mapping[str, Stored]) -> Mapping[str, Stored]:
        started = time.perf_counter()
        block, inputs, recipe = original.block, original.inputs, self.recipe
        decoder.load_block(block.index, original.weights)
        outputs, threads = original.outputs.__getitem__, torch.get_num_threads()
        error = loaded_block_error(decoder, block.index, inputs.__getitem__, outputs, threads, recipe.kind.first)
        W = {name: original.weights[f"{name}.weight"] for name in starts}
        options = TuneOptions(recipe.tune_steps, recipe.tune_batch, seed=layer_seed(0, block.name))
        found = tune(W, starts, dict.fromkeys(W, recipe.options.quantizer.grid), error, len(inputs), options)
        self.tuning += time.perf_counter() - started
        return found.layers


class PrefixRow(SolvedRow):
    """A recipe of ours whose blocks see what the quantized blocks before them put out, one after the other.

    Tuning brings them to what the original puts out, so that a block also makes up for those before it.
    """

    def __init__(self, recipe: Recipe, hidden: list[Tensor], states: list[Tensor]) -> None:
        super().__init__(recipe, hidden)
        self.name += ", quantized prefix"
        self._states = states

    def load(self, decoder: Decoder, original: Original) -> None:
        index = original.block.index
        decoder.load_block(index, original.weights)
        metrics = calibrate(decoder, original.block, self._states, {self.recipe.kind})[1]
        decoder.drop_block(index)
        super().load(decoder, replace(original, metrics=metrics, inputs=self._states))
        self._states = [decoder.run_block(index, h) for h in self._states]


class PeerRow(Row):
    """What ``peer.py`` has left in a folder."""

    def __init__(self, folder: Path, hidden: list[Tensor]) -> None:
        self._costs: dict[str, Any] = json.loads((folder / "peer.json").read_text())
        super().__init__(self._costs.pop("name"), hidden)
        self._weights = folder / "weights.safetensors"

    def load(self, decoder: Decoder, original: Original) -> None:
        block = original.block
        with safetensors.safe_open(self._weights, "pt") as file:
            dense = {f"{linear.name}.weight": file.get_tensor(f"{linear.name}.weight") for linear in block.linears}
        decoder.load_block(block.index, original.weights | dense)

    def costs(self) -> dict[str, float]:
        return self._costs


Columns = Mapping[str, tuple[str, str]]
"""Heading -> a figure's name and its format."""


def columns(kl_samples: int) -> dict[str, tuple[str, str]]:
    """The columns that every table of rows begins with."""
    return {
        "recipe": ("recipe", ""),
        "bits per weight": ("bits_per_weight", ".2f"),
        f"KL ({kl_samples} sequences)": (f"kl_{kl_samples}", ".3f"),
        "KL": ("kl", ".3f"),
        "perplexity": ("perplexity", ".1f"),
    }


def score(decoder: Decoder, original: list[Tensor], text: Tensor, rows: Sequence[Row]) -> None:
    """Compare all rows with the original behind the last block, for the text ``[N, T]``."""
    decoder.load_head()
    for sequence, ids in enumerate(text):
        logits = decoder.logits(original[sequence])[0]
        for row in rows:
            row.scores.append(compare(logits, decoder.logits(row.hidden[sequence])[0], ids))


def show(rows: Sequence[Mapping[str, float | str]], shown: Columns, arguments: argparse.Namespace) -> None:
    """Print the table; write figures and circumstances to ``arguments.output`` if it is given."""
    print(f"perplexity of the original: {rows[0]['perplexity_original']:.2f}\n")
    print(f"| {' | '.join(shown)} |")
    print("|" + "---|" * len(shown))
    for row in rows:
        print(f"| {' | '.join(format(row.get(name, math.nan), spec) for name, spec in shown.values())} |")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        machine = {
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
        options = {key: str(value) for key, value in vars(arguments).items()}
        content = {"options": options, "torch": torch.__version__, "machine": machine, "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
