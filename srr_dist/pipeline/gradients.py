"""The way back of gradients through a stage's blocks, and the sketches that they leave behind.

While sequences pass forward, a stage keeps what enters each of its blocks on its disk. Gradients then come from the
window's end, at the end of the model from the head, and each block is run once more to take them back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from srr_dist.calibration.backward import block_backward
from srr_dist.calibration.head import head_gradient
from srr_dist.calibration.sketches import Sketch, sketch_passes, sketch_sides
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block, Linear
from srr_dist.pipeline.boundaries import Boundaries, BoundaryWriter
from srr_dist.pipeline.collecting import Collector, KeptStates, SketchedLayer
from srr_dist.pipeline.failures import blame
from srr_dist.pipeline.run import Run, unit_name
from srr_dist.pipeline.stage_plan import StagePlan
from srr_dist.pipeline.statistics import Statistics
from srr_dist.solve import layer_seed

_HELD_OUT = "held-out"


class WayBack:
    """One stage's part of the way back through a window.

    Args:
        run: options.
        decoder: holds the blocks, and the head at the end of the model.
        gradients: of the run, where they are stored between windows.
        plan: the stage's part of the window.
        collector: makes room for the sketches.
        states: what enters each block, and what leaves the last one, by the index of the block entered.
    """

    def __init__(
        self,
        run: Run,
        decoder: Decoder,
        gradients: Boundaries,
        plan: StagePlan,
        collector: Collector,
        states: Mapping[int, KeptStates],
    ) -> None:
        self._run, self._decoder, self._gradients, self._states = run, decoder, gradients, states
        self._blocks, self._scratch = plan.blocks, collector.scratch
        self._behind = plan.blocks[-1] + 1
        self._layers = {index: collector.sketches(run.graph.blocks[index]) for index in sorted(plan.collect)}
        self._left = sketch_passes(run.config.sketch)
        to = plan.save_gradients
        self._writer = BoundaryWriter(gradients, to) if to is not None else None

    @property
    def from_head(self) -> bool:
        """Whether gradients begin behind this stage's last block."""
        return self._behind == len(self._run.graph.blocks)

    def take(self, sequences: Sequence[int], slopes: Sequence[Tensor] | None) -> list[Tensor]:
        """Take gradients back through the blocks, one sequence after the other, adding to the sketches.

        Args:
            sequences: their indices.
            slopes: behind the last block, ``[1, T, d]`` each; None where the window ends, and they begin.

        Returns:
            The gradients before the first block, which are stored besides where the window begins.
        """
        entering = map(self._enter, sequences) if slopes is None else slopes
        device = self._decoder.device
        found = [self._through(*pair) for pair in zip(sequences, (s.to(device) for s in entering), strict=True)]
        if self._writer is not None:
            self._writer.put(sequences, found)
        return found

    def end_pass(self) -> bool:
        """Every sequence has come back; returns whether they are to come once more."""
        self._left -= 1
        for layers in self._layers.values():
            for layer in layers.values():
                layer.sketch.turn()
        return self._left > 0

    def keep(self) -> None:
        """Make durable the gradients that leave the window, and what was summed."""
        if self._writer is not None:
            self._writer.end()
        statistics = Statistics(self._run, self._run.config.sketch)
        for layers in self._layers.values():
            for name, layer in layers.items():
                statistics.save_held_out(f"{name}.{_HELD_OUT}", layer.held_out, self._scratch)
                for side, moment in layer.sketch.sides.items():
                    statistics.save(f"{name}.{side}", moment, self._scratch)

    def _enter(self, sequence: int) -> Tensor:
        """The gradient ``[1, T, d]`` that enters the window from behind: of the head, or as it was stored."""
        if not self.from_head:
            return self._gradients.load(self._behind, sequence)
        seed = layer_seed(self._run.config.seed, f"labels of sequence {sequence}")
        vocabulary = self._run.checkpoint.config.get_text_config().vocab_size
        return head_gradient(self._decoder.logits, self._states[self._behind].load(sequence), seed, vocabulary)

    def _through(self, sequence: int, slope: Tensor) -> Tensor:
        """The gradient ``[1, T, d]`` before the first block, from that behind the last one."""
        for index in reversed(self._blocks):
            layers = self._layers.get(index, {})
            linears = {name: layer for name, layer in self._decoder.linear_modules(index).items() if name in layers}
            with blame(unit_name(index)):
                run = partial(self._decoder.run_block, index)
                add = partial(self._add, sequence, layers)
                slope = block_backward(run, linears, self._states[index].load(sequence), slope, add)
        return slope

    def _add(self, sequence: int, layers: Mapping[str, SketchedLayer], name: str, x: Tensor, g: Tensor) -> None:
        if sequence < len(self._run.token_ids) - self._run.held_out:
            layers[name].sketch.update(x, g)
        elif self._left == 1:
            layers[name].held_out.keep(x, g)


def unsketched(run: Run) -> set[int]:
    """Blocks with layers whose sketch is asked for, and not kept."""
    kind = run.config.sketch
    kept = Statistics(run, kind).available() if kind else set()
    return {block.index for block in run.graph.blocks if kind and not _names(run, block) <= kept}


def recall(run: Run, linear: Linear) -> SketchedLayer | None:
    """What is kept of a layer's gradients; None where a part of it is not there any more, or damaged."""
    statistics, (m, n) = Statistics(run, run.config.sketch), (linear.out_features, linear.in_features)
    sketch, found = Sketch(run.config.sketch, m, n), statistics.load_held_out(f"{linear.name}.{_HELD_OUT}")
    whole = all(statistics.load(f"{linear.name}.{side}", moment) for side, moment in sketch.sides.items())
    return SketchedLayer(sketch, found) if found is not None and whole else None


def _names(run: Run, block: Block) -> set[str]:
    """What is kept of a block's layers."""
    return {
        f"{linear.name}.{part}"
        for linear in block.linears
        if linear.name in run.quantized
        for part in (_HELD_OUT, *sketch_sides(run.config.sketch, linear.out_features, linear.in_features))
    }
