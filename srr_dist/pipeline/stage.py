"""A stage: consecutive decoder blocks of one window, from their weights to their committed results.

A stage is told the window (``open``), is fed sequences (``forward``), and then solves each block (``solve``) where
the moments already lie; or gradients come back (``backward``) for the sketches of its blocks. While it solves, the
block before is uploaded, and weights of the next window are read into the room that solved blocks leave. It talks to
storage itself; only hidden states, gradients and small summaries cross Ray.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import torch
from torch import Tensor

from srr_dist.calibration import InputMoment
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block
from srr_dist.pipeline import hidden_states
from srr_dist.pipeline.boundaries import BoundaryWriter, crossings
from srr_dist.pipeline.cluster import Pulse
from srr_dist.pipeline.collecting import Collector, KeptStates
from srr_dist.pipeline.committing import Commits, summary
from srr_dist.pipeline.failures import blame
from srr_dist.pipeline.gradients import WayBack
from srr_dist.pipeline.host import device_name, peak_memory, release_memory, worker_device
from srr_dist.pipeline.run import Run, unit_name
from srr_dist.pipeline.solving import BlockSolver, result_tensors
from srr_dist.pipeline.stage_plan import StagePlan
from srr_dist.pipeline.statistics import Statistics
from srr_dist.pipeline.tuning import BlockTuner
from srr_dist.pipeline.widths import weigh, widths_of
from srr_dist.scratch import Scratch
from srr_dist.store import ObjectStore, RunArea
from srr_dist.store.records import REST


@dataclass
class _Held:
    """One block in memory."""

    block: Block
    source: dict[str, Tensor]
    moments: dict[str, InputMoment]
    seconds: dict[str, float] = field(default_factory=dict)


class Stage(Pulse):
    """The worker's side of the pipeline.

    Methods are called one at a time, in the order the driver submits them; ``commit`` alone waits beside the others.
    What goes wrong unexpectedly comes out as a UnitError that names the block.
    """

    def __init__(self, run: Run, placement: str, threads: int) -> None:
        self.run = run
        self.threads = threads
        self.device = worker_device()
        self.decoder = Decoder(run.checkpoint, dtype=run.dtype, device=self.device)
        self.area = RunArea(ObjectStore(run.output, run.single_driver), run.fingerprint)
        self.boundaries, self.gradients = crossings(run, self.area)
        self.statistics = Statistics(run)
        self.scratch = Scratch()
        self.collector = Collector(run, placement, self.device, self.scratch.path)
        self.commits = Commits(run, self.area, device_name(self.device), self.scratch.path)
        self.reader = ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[dict[str, Tensor]]] = {}
        self.held: dict[int, _Held] = {}
        self.states: dict[int, KeptStates] = {}
        """Before each block that will be tuned, and after it; by the index of the block they enter."""
        self.plan: StagePlan | None = None
        self.leaving: BoundaryWriter | None = None
        self.way_back: WayBack | None = None

    def open(self, plan: StagePlan) -> None:
        """Drop the last window and read this one's weights; NaN or Inf in them is a CheckpointError."""
        torch.set_num_threads(self.threads)  # here, because both settings belong to the thread that does the work
        torch.set_grad_enabled(False)
        for index in list(self.held):
            self._drop(index)
        self.plan, self.way_back = plan, None
        self.leaving = BoundaryWriter(self.boundaries, plan.save) if plan.save is not None else None
        self.states = self.collector.states(plan.collect if plan.then == "solve" else ())
        if plan.then == "solve" and self.run.config.mean_bits and not self.run.widths:  # they never change
            self.run = replace(self.run, widths=widths_of(self.run, self.area))
        for index in self.ahead.keys() - set(plan.blocks):
            del self.ahead[index]
        for index in plan.blocks:
            with blame(unit_name(index)):
                self._hold(self.run.graph.blocks[index], collect=index in plan.collect)
        if plan.start == 0:
            self.decoder.load_embedding()
        if plan.then == "back":
            self.way_back = WayBack(self.run, self.decoder, self.gradients, plan, self.collector)

    def forward(self, sequences: Sequence[int], payload: hidden_states.Payload | None) -> hidden_states.Payload | None:
        """Pass sequences through this stage's blocks, one by one, adding to the moments.

        Args:
            sequences: their indices.
            payload: their hidden states from the stage before; None on the first stage, which reads them itself.

        Returns:
            The hidden states for the next stage, or None where the window ends.
        """
        plan = self._plan()
        incoming = self._enter(sequences) if payload is None else hidden_states.unpack(payload, self.run.dtype)
        outgoing = [
            self._through(sequence, hidden.to(self.device))
            for sequence, hidden in zip(sequences, incoming, strict=True)
        ]
        if self.leaving is not None:
            self.leaving.put(sequences, outgoing)
        return None if plan.last else hidden_states.pack(outgoing)

    def end_forward(self) -> None:
        """Every sequence has passed: make boundary and moments durable, let go what only the passes needed."""
        plan = self._plan()
        if self.leaving is not None:
            self.leaving.end()
        if plan.start == 0:
            self.decoder.drop_rest()
        if self.way_back is not None:
            if self.way_back.from_head:
                self.decoder.load_head()
            return
        for index in plan.blocks:
            self.decoder.drop_block(index)
            if index in plan.collect and plan.passes:
                self._keep_moments(self.held[index])
            if index not in plan.collect or plan.then == "nothing":
                self._drop(index)
        release_memory()

    def backward(self, sequences: Sequence[int], payload: hidden_states.Payload | None) -> hidden_states.Payload | None:
        """Take gradients back through this stage's blocks, one by one, adding to the sketches.

        Args:
            sequences: their indices.
            payload: their gradients from the stage behind; None on the last stage, where they begin.

        Returns:
            The gradients for the stage before, or None where the window begins.
        """
        slopes = None if payload is None else hidden_states.unpack(payload, self.run.dtype)
        outgoing = self._way_back().take(sequences, slopes)
        return None if self._plan().start is not None else hidden_states.pack(outgoing)

    def end_backward(self) -> None:
        """Every sequence has come back; for the last time: make gradients and sketches durable, let go the rest."""
        way = self._way_back()
        if way.end_pass():
            return
        way.keep()
        self.way_back = None
        self.decoder.drop_rest()
        for index in list(self.held):
            self._drop(index)

    def weigh(self) -> None:
        """Keep what codes of each width would do to the loss in the layers of every block."""
        for index in sorted(self._plan().collect):
            with blame(unit_name(index)):
                held = self.held[index]
                weigh(self.run, held.block, held.source, self.device, self.scratch.path)
                self._drop(index)

    def solve(self, index: int, generation: int) -> bool:
        """Solve every layer of a block and begin its commit.

        Returns:
            Whether ``commit`` is to follow. A block whose stored moments turn out to be damaged is left as it is, to be
            calibrated in another window.

        Raises:
            CalibrationError: too many of a layer's input rows were NaN or Inf.
        """
        plan = self._plan()
        with blame(unit_name(index)):
            held = self.held[index]
            whole = plan.passes or self._recall_moments(held)
            if whole:
                self._solve(held, generation)
            self._drop(index)
        later = [block for block in plan.ahead if block not in self.ahead]
        if later:
            self.ahead[later[0]] = self.reader.submit(self._read, later[0])
        return whole

    @ray.method(concurrency_group="commit")
    def commit(self, unit: str) -> dict[str, Any]:
        """Wait until a unit that was begun is durable; returns a summary for the progress line."""
        with blame(unit):
            return summary(self.commits.result(unit))

    def store_rest(self, generation: int) -> dict[str, Any]:
        """Read, check and commit every tensor outside the blocks, as the source has it."""
        with blame(REST):
            started = time.perf_counter()
            tensors = self.run.checkpoint.read(self.run.graph.rest)
            seconds = {"read": time.perf_counter() - started}
            self.commits.begin(REST, generation, {"base": tensors}, tensors, seconds, layers=[], stage={})
            return summary(self.commits.result(REST))

    def _hold(self, block: Block, *, collect: bool) -> None:
        started = time.perf_counter()
        begun = self.ahead.pop(block.index, None)
        tensors = begun.result() if begun else self._read(block.index)
        self.decoder.load_block(block.index, tensors)
        plan = self._plan()
        held = _Held(block, tensors if collect and plan.then in ("solve", "weigh") else {}, {})
        if collect and plan.then not in ("back", "weigh"):
            listening = self.decoder.linear_modules(block.index) if plan.passes else None
            held.moments = self.collector.moments(block, listening)
        held.seconds = {"read": time.perf_counter() - started, "calibrate": 0.0}
        self.held[block.index] = held

    def _read(self, index: int) -> dict[str, Tensor]:
        return self.run.checkpoint.read(self.run.graph.blocks[index].tensors)

    def _solve(self, held: _Held, generation: int) -> None:
        started = time.perf_counter()
        solver = BlockSolver(self.run, held.block, held.source, held.moments, self.device)
        solutions = solver.solve(self.threads)
        held.seconds["solve"] = time.perf_counter() - started
        if self.run.config.tune_steps and solutions:
            started = time.perf_counter()
            solutions = self._tuner(held).tune(solver, solutions)
            held.seconds["tune"] = time.perf_counter() - started
        kept = {name: tensor for name, tensor in held.source.items() if name.removesuffix(".weight") not in solutions}
        tensors = result_tensors(solutions, self.run.grid_of)
        self.commits.begin(
            unit_name(held.block.index),
            generation,
            tensors | {"base": kept | tensors["base"]},
            held.source,
            held.seconds,
            layers=[solution.result for solution in solutions.values()],
            stage=self._stage_record(),
        )

    def _tuner(self, held: _Held) -> BlockTuner:
        index = held.block.index
        inputs, targets = self.states[index], self.states[index + 1]
        return BlockTuner(self.run, self.decoder, held.block, held.source, inputs, targets, self.threads)

    def _keep_moments(self, held: _Held) -> None:
        started = time.perf_counter()
        for name, moment in held.moments.items():
            self.statistics.save(name, moment, self.scratch.path)
        held.seconds["write"] = time.perf_counter() - started

    def _recall_moments(self, held: _Held) -> bool:
        """Fill the moments from the statistics; False if one of them is not there any more, or damaged."""
        started = time.perf_counter()
        complete = all(self.statistics.load(name, moment) for name, moment in held.moments.items())
        held.seconds["read"] += time.perf_counter() - started
        return complete

    def _enter(self, sequences: Sequence[int]) -> list[Tensor]:
        """Hidden states that enter the window, ``[1, T, d]`` each: embedded tokens, or the stored boundary."""
        start = self._plan().start
        assert start is not None
        if start:
            return [self.boundaries.load(start, sequence) for sequence in sequences]
        ids = torch.from_numpy(self.run.token_ids[list(sequences)]).to(self.device)
        return [self.decoder.embed(row.unsqueeze(0)) for row in ids]

    def _through(self, sequence: int, hidden: Tensor) -> Tensor:
        if self.way_back is not None:
            self.way_back.enter(sequence, hidden)
        for index in self._plan().passed:
            started = time.perf_counter()
            if index in self.states:
                self.states[index].keep(sequence, hidden)
            with blame(unit_name(index)):
                hidden = self.decoder.run_block(index, hidden)
            self.held[index].seconds["calibrate"] += time.perf_counter() - started
        behind = self._plan().blocks[-1] + 1
        if behind in self.states:
            self.states[behind].keep(sequence, hidden)
        return hidden

    def _way_back(self) -> WayBack:
        assert self.way_back is not None, "open() for gradients comes first"
        return self.way_back

    def _stage_record(self) -> dict[str, Any]:
        plan = self._plan()
        return {
            "stage": plan.stage,
            "window": plan.window,
            "device": str(self.device),
            "planned_memory": plan.planned_memory,
            "peak_memory": peak_memory(self.device),
        }

    def _drop(self, index: int) -> None:
        self.decoder.drop_block(index)
        self.held.pop(index, None)
        release_memory()

    def _plan(self) -> StagePlan:
        assert self.plan is not None, "open() comes first"
        return self.plan
