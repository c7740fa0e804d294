"""What ``yaqa.py`` solves with, in a folder: moments, sketches and gradients of a model's layers, block by block.

All blocks pass forward, and gradients of the model's own labels walk back over them, one block at a time. Sums are
written down whenever one of the asked numbers of sequences is reached. What is there already is not done again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srr_dist.calibration import InputMoment
from srr_dist.calibration.backward import BlockPass
from srr_dist.calibration.head import head_gradient
from srr_dist.calibration.sketches import HeldOut, Sketch
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block, BlockGraph
from srr_dist.seeds import layer_seed


@dataclass(frozen=True)
class Walk:
    """The way of sequences through a model, and back.

    Attributes:
        decoder, graph: the model.
        ids: ``[N, T]``, the sequences; the last of them are held out from sums.
        held_out: so many.
        counts: write sums after so many sequences.
        kinds: of sketches.
        first: how many tokens a sequence's first one counts for in moments.
        folder: where all of it goes.
    """

    decoder: Decoder
    graph: BlockGraph
    ids: Tensor
    held_out: int
    counts: Sequence[int]
    kinds: Sequence[str]
    first: int
    folder: Path

    def block(self, index: int) -> dict[str, Any]:
        """What was collected of a block, mapped from disk.

        ``held_out``: layer -> the tensors of a ``HeldOut``; and by number of sequences: ``moments`` (input -> H) and
        ``sketches`` (layer -> kind -> side -> factor), float32.
        """
        found: dict[str, Any] = torch.load(self._path("block", index), mmap=True)
        kept = found.keys() - {"held_out"}
        if lacking := {str(count) for count in self.counts} - kept:
            raise SystemExit(
                f"{self.folder}: has sums of {', '.join(sorted(kept))} sequences, not of {', '.join(sorted(lacking))}; "
                "name another --folder"
            )
        return found

    def collect(self) -> None:
        """Do what is left to do."""
        self.folder.mkdir(parents=True, exist_ok=True)
        last = len(self.graph.blocks)
        if not self._path("slopes", last).exists():
            self._forward()
        for block in reversed(self.graph.blocks):
            if not self._path("slopes", block.index).exists():
                started = time.process_time()
                slopes = torch.load(self._path("slopes", block.index + 1))
                self._write("block", block.index, self._back(block, slopes))
                self._write("slopes", block.index, slopes)
                self._path("slopes", block.index + 1).write_bytes(b"")
                print(f"back through block {block.index}: {time.process_time() - started:.0f} s", file=sys.stderr)

    def _path(self, what: str, index: int) -> Path:
        return self.folder / f"{what}-{index}.pt"

    def _write(self, what: str, index: int, value: Any) -> None:
        part = self.folder / "part"
        torch.save(value, part)
        part.rename(self._path(what, index))

    def _forward(self) -> None:
        started = time.process_time()
        self.decoder.load_embedding()
        states = [self.decoder.embed(row[None]) for row in self.ids]
        for block in self.graph.blocks:
            self._write("states", block.index, torch.cat(states))
            self.decoder.load_block(block.index)
            states = [self.decoder.run_block(block.index, state) for state in states]
            self.decoder.drop_block(block.index)
        print(f"forward: {time.process_time() - started:.0f} s", file=sys.stderr)
        started = time.process_time()
        self.decoder.load_head()
        vocabulary = self.decoder.logits(states[0][:, :1]).shape[-1]
        seeds = [layer_seed(0, f"labels of sequence {sequence}") for sequence in range(len(states))]
        slopes = [
            head_gradient(self.decoder.logits, state, seed, vocabulary)
            for state, seed in zip(states, seeds, strict=True)
        ]
        self.decoder.drop_rest()
        self._write("slopes", len(self.graph.blocks), torch.cat(slopes))
        print(f"labels and head: {time.process_time() - started:.0f} s", file=sys.stderr)

    def _back(self, block: Block, slopes: Tensor) -> dict[str, Any]:
        """Take gradients ``[N, T, d]`` back through a block, in their place."""
        self.decoder.load_block(block.index)
        sums = _Sums(block, self.kinds, self.first)
        states, seen = torch.load(self._path("states", block.index), mmap=True), len(self.ids) - self.held_out
        run, linears = partial(self.decoder.run_block, block.index), self.decoder.linear_modules(block.index)
        found: dict[str, Any] = {}
        for sequence in range(len(self.ids)):
            deliver = sums.add if sequence < seen else sums.hold_out
            slopes[sequence] = BlockPass(run, linears, states[sequence][None], deliver).back(slopes[sequence][None])[0]
            if sequence + 1 in self.counts:
                found[str(sequence + 1)] = sums.value()
        self.decoder.drop_block(block.index)
        return found | {"held_out": {name: held.tensors() for name, held in sums.held_out.items()}}


class _Sums:
    """A block's moments and sketches, while sequences come back."""

    def __init__(self, block: Block, kinds: Sequence[str], first: int) -> None:
        self._first = first
        shapes = {linear.name: (linear.out_features, linear.in_features) for linear in block.linears}
        self.moments = {linear.input: InputMoment(linear.in_features, "exact") for linear in block.linears}
        self.sketches = {name: {kind: Sketch(kind, *shape) for kind in kinds} for name, shape in shapes.items()}
        self.held_out = {name: HeldOut() for name in shapes}

    def add(self, name: str, x: Tensor, g: Tensor) -> None:
        if name in self.moments:  # an input has the name of the first layer that reads it
            self.moments[name].update(x, self._first)
        for sketch in self.sketches[name].values():
            sketch.update(x, g)

    def hold_out(self, name: str, x: Tensor, g: Tensor) -> None:
        self.held_out[name].keep(x, g)

    def value(self) -> dict[str, Any]:
        sketches = {
            name: {kind: {side: H.float() for side, H in sketch.value().items()} for kind, sketch in kinds.items()}
            for name, kinds in self.sketches.items()
        }
        return {
            "moments": {name: moment.value().float() for name, moment in self.moments.items()},
            "sketches": sketches,
        }
