"""The way back of gradients through a stage's blocks, and the sketches that they leave behind.

While sequences pass forward, a stage keeps on its disk what enters its first block. Gradients then come from where the
window ends, at the end of the model from the head; the blocks are run once more for each, and it is taken back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from srr_dist.calibration.backward import BlockPass
from srr_dist.calibration.head import head_gradient
from srr_dist.calibration.sketches import HeldOut, Sketch, sketch_passes, sketch_sides
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block, Linear
from srr_dist.pipeline.boundaries import Boundaries, BoundaryWriter
from srr_dist.pipeline.collecting import Collector, SketchedLayer
from srr_dist.pipeline.failures import blame
from srr_dist.pipeline.run import Run, unit_name
from srr_dist.pipeline.stage_plan import StagePlan
from srr_dist.pipeline.statistics import Statistics
from srr_dist.seeds import layer_seed

_HELD_OUT = "held-out"


class WayBack:
    """One stage's part of the way back through a window.

    Args:
        run: options.
        decoder: holds the blocks, and the head at the end of the model.
        gradients: of the run, where they are stored between windows.
        plan: the stage's part of the window.
        collector: makes room for the sketches, and for what enters the blocks.
    """

    def __init__(
        self, run: Run, decoder: Decoder, gradients: Boundaries, plan: StagePlan, collector: Collector
    ) -> None:
        self._run, self._decoder, self._gradients = run, decoder, gradients
        self._entering = collector.room()
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

    def enter(self, sequence: int, hidden: Tensor) -> None:
        """Keep what enters the first block, ``[1, T, d]``."""
        self._entering.keep(sequence, hidden)

    def take(self, sequences: Sequence[int], slopes: Sequence[Tensor] | None) -> list[Tensor]:
        """Take gradients back through the blocks, one sequence after the other, adding to the sketches.

        Args:
            sequences: their indices.
            slopes: behind the last block, ``[1, T, d]`` each; None where the window ends, and they begin.

        Returns:
            The gradients before the first block, which are stored besides where the window begins.
        """
        begins: Sequence[Tensor | None] = slopes or [None] * len(sequences)
        found = [self._through(sequence, slope) for sequence, slope in zip(sequences, begins, strict=True)]
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

    def _through(self, sequence: int, slope: Tensor | None) -> Tensor:
        """The gradient ``[1, T, d]`` before the first block, from that behind the last one."""
        hidden, passes = self._entering.load(sequence), list[BlockPass]()
        for index in self._blocks:
            layers = self._layers.get(index, {})
            linears = {name: layer for name, layer in self._decoder.linear_modules(index).items() if name in layers}
            run, add = partial(self._decoder.run_block, index), partial(self._add, sequence, layers)
            with blame(unit_name(index)):
                passes.append(BlockPass(run, linears, hidden, add))
            hidden = passes[-1].output
        slope = (self._begin(sequence, hidden) if slope is None else slope).to(hidden.device)
        for index in reversed(self._blocks):
            with blame(unit_name(index)):
                slope = passes.pop().back(slope)
        return slope

    def _begin(self, sequence: int, hidden: Tensor) -> Tensor:
        """The gradient that enters the window from behind: as it was stored, or that of the head's loss."""
        if not self.from_head:
            return self._gradients.load(self._behind, sequence)
        seed = layer_seed(self._run.config.seed, f"labels of sequence {sequence}")
        vocabulary = self._run.checkpoint.config.get_text_config().vocab_size
        return head_gradient(self._decoder.logits, hidden, seed, vocabulary)

    def _add(self, sequence: int, layers: Mapping[str, SketchedLayer], name: str, x: Tensor, g: Tensor) -> None:
        if sequence < len(self._run.token_ids) - self._run.held_out:
            layers[name].sketch.update(x, g)
        elif self._left == 1:
            layers[name].held_out.keep(x, g)


def unsketched(run: Run) -> set[int]:
    """Blocks with layers whose sketch is asked for, and not kept."""
    if not run.config.sketch:
        return set()
    kept = Statistics(run, run.config.sketch).available()
    return {block.index for block in run.graph.blocks if not _names(run, block) <= kept}


def recall(run: Run, linear: Linear) -> SketchedLayer | None:
    """What is kept of a layer's gradients; None where a part of it is not there any more, or damaged."""
    statistics, (m, n) = Statistics(run, run.config.sketch), (linear.out_features, linear.in_features)
    sketch = Sketch(run.config.sketch, m, n, band=run.config.sketch_band)
    found = recall_held_out(run, linear)
    whole = all(statistics.load(f"{linear.name}.{side}", moment) for side, moment in sketch.sides.items())
    return SketchedLayer(sketch, found) if found is not None and whole else None


def recall_held_out(run: Run, linear: Linear) -> HeldOut | None:
    """What is kept of a layer's gradients in sequences held out; None as above."""
    return Statistics(run, run.config.sketch).load_held_out(f"{linear.name}.{_HELD_OUT}")


def _names(run: Run, block: Block) -> set[str]:
    """What is kept of a block's layers."""
    return {
        f"{linear.name}.{part}"
        for linear in block.linears
        if linear.name in run.quantized
        for part in (_HELD_OUT, *sketch_sides(run.config.sketch, linear.out_features, linear.in_features))
    }
