"""Seconds that sketches take beside a forward pass of the same model over the same tokens, in one process.

    OMP_NUM_THREADS=1 python benchmarks/sketch.py --model demo/SmolLM2-135M-Instruct.Q4_1.gguf

"forward" is a pass through all blocks and the head. Of the way back, "head back" draws labels and takes their gradient,
"blocks back" runs each block under autograd and back, and "sums" adds the gradients to the sketches; "moments" are of
the inputs, for comparison. With several workers all but the last one pass sequences forward once more, so that their
inputs are there. Seconds are the processor's own, so that other work on the machine counts for little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from srr_dist.calibration import InputMoment
from srr_dist.calibration.backward import BlockPass
from srr_dist.calibration.head import head_gradient
from srr_dist.calibration.sketches import Sketch
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block, BlockGraph, build_graph
from srr_dist.checkpoint.source import open_checkpoint


class Clock:
    """Processor seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Tensor | None]) -> Tensor:
        started = time.process_time()
        found = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
        return torch.empty(0) if found is None else found


def pass_forward(decoder: Decoder, graph: BlockGraph, ids: Tensor, clock: Clock) -> list[Tensor]:
    """What enters each block, and what leaves the last one, of one sequence ``[1, T]``."""
    states = [decoder.embed(ids)]
    for block in graph.blocks:
        run = partial(decoder.run_block, block.index, states[-1])
        states.append(clock.time("blocks forward", run))
    clock.time("head", lambda: decoder.logits(states[-1]))
    return states


def back(
    decoder: Decoder, block: Block, entering: list[Tensor], slopes: list[Tensor], kind: str, clock: Clock
) -> list[Tensor]:
    """One block's way back with all sequences, its sketches and, for comparison, its moments."""
    delivered: dict[str, tuple[Tensor, Tensor]] = {}
    linears, run = decoder.linear_modules(block.index), partial(decoder.run_block, block.index)
    sketches = {linear.name: Sketch(kind, linear.out_features, linear.in_features) for linear in block.linears}
    moments = {linear.input: InputMoment(linear.in_features, "exact") for linear in block.linears}

    def keep(name: str, x: Tensor, g: Tensor) -> None:
        delivered[name] = (x, g)

    found = []
    for hidden, slope in zip(entering, slopes, strict=True):
        walk = partial(lambda h, s: BlockPass(run, linears, h, keep).back(s), hidden, slope)
        found.append(clock.time("blocks back", walk))
        for name, (x, g) in delivered.items():
            clock.time("sums", partial(sketches[name].update, x, g))
            if name in moments:
                clock.time("moments", partial(moments[name].update, x))
    for side in chain.from_iterable(sketch.sides.values() for sketch in sketches.values()):
        clock.time("sums", side.settle)
    for moment in moments.values():
        clock.time("moments", moment.settle)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kind", default="B", help="of sketch")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    checkpoint = open_checkpoint(arguments.model)
    graph, decoder = build_graph(checkpoint), Decoder(checkpoint, dtype=torch.float32)
    decoder.load_embedding()
    decoder.load_head()
    for block in graph.blocks:
        decoder.load_block(block.index)
    clock, generator = Clock(), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 10_000, (arguments.sequences, 1, arguments.seq_len), generator=generator)
    states = [pass_forward(decoder, graph, row, clock) for row in ids]
    vocabulary = decoder.logits(states[0][-1][:, :1]).shape[-1]
    begin = partial(head_gradient, decoder.logits, seed=0, vocabulary=vocabulary)
    slopes = [clock.time("head back", partial(begin, hidden=each[-1])) for each in states]
    for block in reversed(graph.blocks):
        slopes = back(decoder, block, [each[block.index] for each in states], slopes, arguments.kind, clock)
    seconds = clock.seconds
    forward = seconds.pop("blocks forward") + seconds.pop("head")
    collection = sum(seconds.values()) - seconds["moments"]
    seconds = {"forward": forward} | seconds | {"collection": collection}
    print(f"| {arguments.kind}, {arguments.sequences} × {arguments.seq_len} tokens | seconds | forward passes |")
    print("| --- | ---: | ---: |")
    for name, spent in seconds.items():
        print(f"| {name} | {spent:.1f} | {spent / forward:.2f} |")


if __name__ == "__main__":
    main()
