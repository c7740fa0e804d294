"""How long a planned run will take on some hardware, and what it will cost: counted work over rates, laid out in time.

Time passes as in the pipeline. Sequences flow through the stages of a window, each stage solves its own blocks after
that, what is solved is stored beside the next block, and blocks of the next window are read meanwhile. Nothing fails
and nothing is resumed; moments that ``--statistics`` keeps, or has kept, are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import torch

from srr_dist.checkpoint.graph import Block
from srr_dist.config import BITS
from srr_dist.pipeline import operations
from srr_dist.pipeline.hardware import Hardware
from srr_dist.pipeline.memory import gib, layers_at_once
from srr_dist.pipeline.operations import Work
from srr_dist.pipeline.plan import Plan, block_output_bytes, hidden_size, output_bytes
from srr_dist.pipeline.prepare import SCAN_BYTES
from srr_dist.pipeline.windows import Window, batches
from srr_dist.solve import Quantizer

_WIDE = ("forward", "moments", "products", "narrow", "elementwise")
"""Kinds of work that all threads of a CPU share."""

_HOP_BYTES = 8
"""Copies of a hidden state that the hosts of two stages make on its way between them, reads and writes."""


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        hardware: of each worker.
        workers: how many.
        seconds: phase -> wall seconds, in the order of a run: starting, reading, calibrating, solving (and tuning),
            assembling.
        stored: bytes between storage and workers, in all.
    """

    hardware: Hardware
    workers: int
    seconds: Mapping[str, float]
    stored: int

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return sum(self.seconds.values()) / 3600

    def price(self, per_hour: float) -> float:
        """Of the workers, at a price for an hour of one."""
        return self.hours * self.workers * per_hour

    def describe(self, per_hour: float | None = None) -> str:
        """The forecast for a person; with a price only where one is given."""
        phases = ", ".join(f"{phase} {seconds / 3600:.2f}" for phase, seconds in self.seconds.items())
        basis = f"measured on {self.hardware.measured}" if self.hardware.measured else "NOT CALIBRATED"
        source = "" if self.hardware.measured else ", the data sheet's rates times assumed shares"
        lines = [
            f"forecast       {self.workers} × {self.hardware.name}; {basis}{source}",
            f"hours          {self.hours:.2f} ({phases})",
            f"storage        {gib(self.stored)} read and written",
        ]
        if per_hour is not None:
            worker_hours = f"{self.hours * self.workers:.2f} worker hours at {per_hour:g}"
            lines.append(f"cost           {self.price(per_hour):.2f} ({worker_hours}; storage and head not counted)")
        return "\n".join(lines)


def forecast(plan: Plan, hardware: Hardware) -> Forecast:
    """The time that an undisturbed run of a plan takes on workers of some hardware."""
    costs = Costs(plan, hardware)
    seconds = {"starting": hardware.start + costs.scan(), "reading": 0.0, "calibrating": 0.0, "solving": 0.0}
    seconds["reading"] += costs.first_reading(plan.windows[0])
    if plan.run.config.mean_bits:
        seconds["weighing"] = sum(costs.weighing(window) for window in plan.windows)
    for window, later in zip_longest(plan.windows, plan.windows[1:]):
        if window.passes:
            seconds["calibrating"] += costs.passes(window, costs.calibrate)
            if plan.run.config.sketch:
                seconds["calibrating"] += costs.passes(window, costs.sketch)
        solved, late = costs.solving(window, later)
        seconds["solving"] += solved
        seconds["reading"] += late
    seconds["assembling"] = costs.of(Work(write=output_bytes(plan.run)))
    traffic = plan.traffic()
    stored = sum(traffic.values()) + traffic["boundaries written and read"]  # which are so many each way
    return Forecast(hardware, plan.cluster.workers, seconds, stored)


@dataclass(frozen=True)
class Costs:
    """Seconds that the parts of a plan take on some hardware."""

    plan: Plan
    hardware: Hardware

    @cached_property
    def rates(self) -> Mapping[str, float]:
        """Of a worker: all threads of a CPU, or its GPU, whose float32 passes run at the rate of float32 products."""
        rates = dict(self.hardware.rates)
        if not self.plan.cluster.gpus:
            return rates | {kind: rates[kind] * self.plan.cluster.cpus for kind in _WIDE}
        if self.plan.run.dtype == torch.float32:
            return rates | {"forward": rates["products"], "moments": rates["products"]}
        return rates

    def of(self, work: Work) -> float:
        """Seconds of some work."""
        return work.seconds(self.rates)

    def scan(self) -> float:
        """Reading a small checkpoint once for NaN and Inf before anything starts."""
        size = self.plan.run.checkpoint.total_bytes
        return self.of(Work(read=size)) if size <= SCAN_BYTES else 0.0

    def read(self, block: Block) -> float:
        """A block's tensors, from storage to its worker."""
        return self.of(Work(read=block.nbytes))

    def first_reading(self, window: Window) -> float:
        """The first window: the last stage stores the tensors outside the blocks before it reads its own."""
        run = self.plan.run
        outside = sum(run.checkpoint.tensors[name].nbytes for name in run.graph.rest)
        stages = [sum(self.read(run.graph.blocks[index]) for index in stage) for stage in window.stages]
        stages[-1] += self.of(Work(read=outside, digest=2 * outside, write=outside))
        return max(stages)

    def passes(self, window: Window, through: Callable[[int, Window], float]) -> float:
        """All sequences through the stages of a window, message after message, each so long in a block."""
        count, seq_len = self.plan.run.token_ids.shape
        sequence = seq_len * hidden_size(self.plan.run.checkpoint) * self.plan.run.dtype.itemsize
        stages = [sum(through(index, window) for index in stage) for stage in window.stages]
        hop = self.of(Work(host=_HOP_BYTES * sequence, link=2 * sequence)) if len(stages) > 1 else 0.0
        stages = [stage + hop for stage in stages]
        if window.start:
            stages[0] += self.of(Work(read=sequence, digest=sequence))
        sizes = [len(batch) for batch in batches(count, len(stages), sequence)]
        written = self.of(Work(write=count * sequence)) if window.save is not None else 0.0
        return max(flow(stages, sizes), written)

    def calibrate(self, index: int, window: Window) -> float:
        """A sequence through a block, and added to its moments."""
        run, block = self.plan.run, self.plan.run.graph.blocks[index]
        seq_len = run.token_ids.shape[1]
        work = operations.passing(block, seq_len, hidden_size(run.checkpoint))
        if index in window.collect:
            away = bool(self.plan.cluster.gpus) and self.plan.holding.placement != "device"
            work += operations.moments(block, run.quantized, seq_len, run.config.scaling, away=away)
        return self.of(work)

    def sketch(self, index: int, _: Window) -> float:
        """A sequence forward once more, to be kept, and its gradients back, added to the block's sketches."""
        run, block = self.plan.run, self.plan.run.graph.blocks[index]
        seq_len, sketch = run.token_ids.shape[1], (run.config.sketch, run.config.sketch_band)
        once = operations.passing(block, seq_len, hidden_size(run.checkpoint))
        return self.of(once + operations.sketching(block, run.quantized, *sketch, seq_len, once))

    def weighing(self, window: Window) -> float:
        """A window's blocks read once more before all others, and their layers rounded to codes of every width."""
        run, blocks = self.plan.run, self.plan.run.graph.blocks
        quantizer = Quantizer(run.grid, run.config.scales, "nearest")

        def one(block: Block) -> float:
            counts = {"widths": len(BITS), "held_out": run.held_out, "seq_len": run.token_ids.shape[1]}
            return self.read(block) + self.of(operations.weighing(block, run.quantized, quantizer, **counts))

        return max(sum(one(blocks[index]) for index in stage) for stage in window.stages)

    def solving(self, window: Window, later: Window | None) -> tuple[float, float]:
        """Until the last block of a window is stored, and from then until the next window's blocks are read."""
        ahead = later.stages if later is not None else ()
        ends, reads = [], []
        for stage, following in zip_longest(window.stages, ahead[: len(window.stages)], fillvalue=()):
            end, read = self._solve_stage(stage, following)
            ends.append(end)
            reads.append(read)
        return max(ends), max(0.0, max(reads) - max(ends))

    def _solve_stage(self, stage: Sequence[int], following: Sequence[int]) -> tuple[float, float]:
        """When a stage's blocks are stored, and when those it reads ahead, one as each is solved, are read."""
        blocks = self.plan.run.graph.blocks
        now = stored = read = 0.0
        queue = [self.read(blocks[index]) for index in following]
        for index in stage:
            now = max(now + self.solve(blocks[index]), stored) + self.of(self._storing(blocks[index]))
            stored = now + self._upload(blocks[index])
            if queue:
                read = max(read, now) + queue.pop(0)
        return stored, max(read, stored if queue else 0.0) + sum(queue)

    def solve(self, block: Block) -> float:
        """One block's layers, small ones side by side on the threads of a CPU; then its tuning."""
        run, cluster = self.plan.run, self.plan.cluster
        full = run.config.scaling == "exact" and run.calibrated
        band = run.config.sketch_band
        groups = operations.solving(block, run.quantized, run.solve_options(run.grid), full=full, band=band)
        at_once = layers_at_once(block, run.quantized, cluster.cpus, on_gpu=bool(cluster.gpus))
        rates = self.hardware.rates if at_once > 1 else self.rates  # each of them then has one thread
        return side_by_side([group.seconds(rates) for group in groups], at_once) + self._tune(block)

    def _tune(self, block: Block) -> float:
        run = self.plan.run
        steps, count = run.config.tune_steps, len(run.token_ids)
        one = operations.passing(block, run.token_ids.shape[1], hidden_size(run.checkpoint))
        work = operations.tuning(
            block, run.quantized, one, rank=run.config.rank, steps=steps, batch=run.config.tune_batch,
            held=max(1, count // 8),
        )  # fmt: skip
        return self.of(work)

    def _storing(self, block: Block) -> Work:
        return operations.storing(block, self.plan.run.quantized)

    def _upload(self, block: Block) -> float:
        size = block_output_bytes(self.plan.run, block)
        return self.of(Work(write=size, digest=size))


def flow(stages: Sequence[float], sizes: Sequence[int]) -> float:
    """Seconds until the last message has left the last stage.

    Args:
        stages: seconds a sequence takes in each; a stage works on one message at a time, in their order.
        sizes: sequences of each message.
    """
    free = [0.0] * len(stages)
    for size in sizes:
        arrived = 0.0
        for index, seconds in enumerate(stages):
            arrived = free[index] = max(arrived, free[index]) + size * seconds
    return free[-1]


def side_by_side(seconds: Sequence[float], at_once: int) -> float:
    """Until the last of some tasks is done, so many at once, each begun as soon as there is room for it."""
    free = [0.0] * at_once
    for task in seconds:
        first = free.index(min(free))
        free[first] += task
    return max(free)
