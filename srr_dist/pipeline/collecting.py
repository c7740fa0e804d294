"""What a stage gathers while sequences pass: moments of layer inputs, hidden states between blocks, and sketches."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from srr_dist.calibration import InputMoment, accumulator_shape
from srr_dist.calibration.sketches import HeldOut, Sketch, sketch_sides
from srr_dist.checkpoint.graph import Block, shared_inputs
from srr_dist.pipeline.plan import hidden_size
from srr_dist.pipeline.run import Run


class KeptStates:
    """Hidden states at one place of the model, of every calibration sequence: a file of the local disk, mapped.

    Args:
        scratch: the folder it takes space in.
        shape: ``[N, T, d]``.
        dtype: of the values.
        device: where they are handed out.
    """

    def __init__(self, scratch: Path, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._states, self._device = mapped(scratch, shape, dtype), device

    def __len__(self) -> int:
        return len(self._states)

    def load(self, sequence: int) -> Tensor:
        """``[1, T, d]`` of one sequence."""
        return self._states[sequence : sequence + 1].to(self._device)

    def keep(self, sequence: int, hidden: Tensor) -> None:
        """Store ``hidden: [1, T, d]``."""
        self._states[sequence] = hidden[0]


@dataclass(frozen=True)
class SketchedLayer:
    """What gradients tell of a layer: its sketch, and the sequences held out from it."""

    sketch: Sketch
    held_out: HeldOut


@dataclass(frozen=True)
class Collector:
    """Makes the room that a run's plan has for what is gathered.

    Attributes:
        run: selection, scaling, shapes.
        placement: where moments are, one of ``memory.PLACEMENTS``.
        device: of the forward pass.
        scratch: a folder of the local disk.
    """

    run: Run
    placement: str
    device: torch.device
    scratch: Path

    def moments(self, block: Block, modules: Mapping[str, nn.Module] | None) -> dict[str, InputMoment]:
        """An empty moment per shared input of a block, fed by a hook on the first of these modules that reads it."""
        found, first = {}, self.run.first_token_weight
        for shared in shared_inputs(block, self.run.quantized) if self.run.calibrated else ():
            linear, features = shared[0], shared[0].in_features
            scaling = self.run.config.scaling
            moment = InputMoment(features, scaling, self.device, self._accumulator(features, scaling))
            found[linear.input] = moment

            def add(module: nn.Module, args: tuple[Tensor], moment: InputMoment = moment) -> None:
                moment.update(args[0].reshape(-1, moment.features), first)

            if modules is not None:
                modules[linear.input].register_forward_pre_hook(add)
        return found

    def sketches(self, block: Block) -> dict[str, SketchedLayer]:
        """An empty sketch per selected layer of a block."""
        kind, band, found = self.run.config.sketch, self.run.config.sketch_band, {}
        for linear in block.linears:
            if linear.name in self.run.quantized:
                m, n = linear.out_features, linear.in_features
                totals = {name: self._accumulator(*side) for name, side in sketch_sides(kind, m, n, band).items()}
                found[linear.name] = SketchedLayer(Sketch(kind, m, n, self.device, totals, band), HeldOut())
        return found

    def states(self, blocks: Iterable[int]) -> dict[int, KeptStates]:
        """Room for the hidden states before and after these blocks, by the block they enter; none without tuning."""
        if not self.run.config.tune_steps:
            return {}
        return {place: self.room() for place in sorted({place for index in blocks for place in (index, index + 1)})}

    def room(self) -> KeptStates:
        """Room for the hidden states at one place."""
        shape = (*self.run.token_ids.shape, hidden_size(self.run.checkpoint))
        return KeptStates(self.scratch, shape, self.run.dtype, self.device)

    def _accumulator(self, features: int, scaling: str, bands: int = 1) -> Tensor | None:
        """Memory for a moment where the plan wants it; None for beside the weights."""
        shape = accumulator_shape(features, scaling, bands)
        match self.placement:
            case "device":
                return None
            case "host":
                return torch.zeros(shape, dtype=torch.float64)
        return mapped(self.scratch, shape, torch.float64).zero_()


def mapped(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a file of that folder; the file has no name, and its space is free once the tensor goes."""
    path = folder / uuid.uuid4().hex
    tensor = torch.from_file(str(path), shared=True, size=int(torch.Size(shape).numel()), dtype=dtype)
    path.unlink()
    return tensor.reshape(shape)
