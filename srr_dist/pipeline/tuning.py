"""A solved block, tuned against what the original block puts out for the sequences that a stage has kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from srr_dist.calibration.block_error import OutputError
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block
from srr_dist.pipeline.collecting import KeptStates
from srr_dist.pipeline.run import Run
from srr_dist.pipeline.solving import BlockSolver
from srr_dist.seeds import layer_seed
from srr_dist.solve import LayerSolution, Tuned, TuneOptions, tune


@dataclass(frozen=True)
class BlockTuner:
    """One block, with what it takes to tune it.

    Attributes:
        run: options.
        decoder: runs the block.
        block: the block.
        weights: the source's tensors by name.
        inputs, targets: the original's hidden states before and after the block, of each sequence.
        threads: of the CPU; without a GPU, so many sequences are passed back at once.
    """

    run: Run
    decoder: Decoder
    block: Block
    weights: Mapping[str, Tensor]
    inputs: KeptStates
    targets: KeptStates
    threads: int

    def tune(self, solver: BlockSolver, solutions: Mapping[str, LayerSolution]) -> dict[str, LayerSolution]:
        """The best of what gradient steps make of the solutions of a solver; each record tells of the block's error."""
        found = self._tuned(solutions)
        changed = solver.remeasure(solutions, found.layers) if found.step else dict(solutions)
        for solution in changed.values():
            solution.result["tuning"] = {"step": found.step, "before": found.error_before, "after": found.error}
        return changed

    def _tuned(self, solutions: Mapping[str, LayerSolution]) -> Tuned:
        config, index, device = self.run.config, self.block.index, self.decoder.device
        self.decoder.load_block(index, self.weights)
        error = loaded_block_error(
            self.decoder, index, self.inputs.load, self.targets.load, self.threads, self.run.first_token_weight
        )
        tuned = tune(
            {name: self.weights[f"{name}.weight"].to(device) for name in solutions},
            {name: solution.to(device) for name, solution in solutions.items()},
            {name: self.run.grid_of(name) for name in solutions},
            error,
            len(self.inputs),
            TuneOptions(config.tune_steps, config.tune_batch, seed=layer_seed(config.seed, self.block.name)),
        )
        self.decoder.drop_block(index)
        return tuned


def loaded_block_error(
    decoder: Decoder,
    index: int,
    inputs: Callable[[int], Tensor],
    targets: Callable[[int], Tensor],
    threads: int,
    first: int,
) -> OutputError:
    """The error of the block that a decoder holds, towards these outputs for these inputs of each sequence.

    Without a GPU so many sequences as there are threads are passed side by side; ``first`` is the weight of first
    tokens.
    """
    decoder.run_block(index, inputs(0))  # records its call before threads ask for it
    at_once = threads if decoder.device.type == "cpu" else 1
    run, linears = partial(decoder.run_block, index), decoder.linear_modules(index)
    return OutputError(run, linears, inputs, targets, at_once, first)
