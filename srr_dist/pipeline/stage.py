"""A stage: consecutive decoder blocks of one window, from their weights to their committed results.

A stage is told the window (``open``), is fed sequences (``forward``), and then solves each block (``solve``) where
the moments already lie. It talks to storage itself; only hidden states and small summaries cross Ray.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from srr_dist.calibration import InputMoment, accumulator_shape
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import Block
from srr_dist.pipeline import hidden_states
from srr_dist.pipeline.boundaries import Boundaries
from srr_dist.pipeline.cluster import Pulse
from srr_dist.pipeline.failures import blame
from srr_dist.pipeline.host import device_name, peak_memory, release_memory, worker_device
from srr_dist.pipeline.run import Run, unit_name, versions
from srr_dist.pipeline.solving import BlockSolver, shared_inputs
from srr_dist.pipeline.statistics import Statistics
from srr_dist.store import BlockRecord, ObjectStore, RunArea
from srr_dist.store.records import REST

log = logging.getLogger(__name__)

_BOUNDARY_WRITERS = 2


@dataclass(frozen=True)
class StagePlan:
    """What a stage does in one window."""

    stage: int
    window: int
    blocks: tuple[int, ...]
    collect: frozenset[int]
    """Blocks to calibrate and solve; the others only pass hidden states on."""
    start: int | None
    """On the first stage: the block whose boundary the sequences are read from, 0 for the tokens."""
    save: int | None
    """On the last stage: the block before which the outgoing hidden states are stored, None to let them go."""
    last: bool
    """Whether the window ends with this stage."""
    planned_memory: dict[str, int]
    passes: bool = True
    """Whether sequences pass; if not, moments are taken from the statistics."""


@dataclass
class _Held:
    """One block in memory."""

    block: Block
    source: dict[str, Tensor]
    moments: dict[str, InputMoment]
    seconds: dict[str, float] = field(default_factory=dict)


class Stage(Pulse):
    """The worker's side of the pipeline. Methods are called one at a time, in the order the driver submits them.

    What goes wrong unexpectedly comes out as a UnitError that names the block.
    """

    def __init__(self, run: Run, placement: str, threads: int) -> None:
        self.run = run
        self.threads = threads
        self.placement = placement
        self.device = worker_device()
        self.decoder = Decoder(run.checkpoint, dtype=run.dtype, device=self.device)
        self.area = RunArea(ObjectStore(run.output, run.single_driver), run.fingerprint)
        self.boundaries = Boundaries(self.area)
        self.statistics = Statistics(run)
        self.scratch = tempfile.TemporaryDirectory(prefix="srr-stage-")
        self.writers = ThreadPoolExecutor(_BOUNDARY_WRITERS)
        self.held: dict[int, _Held] = {}
        self.plan: StagePlan | None = None
        self.saved: dict[int, Future[str]] = {}

    def open(self, plan: StagePlan) -> None:
        """Drop the last window and read this one's weights; NaN or Inf in them is a CheckpointError."""
        torch.set_num_threads(self.threads)  # here, because both settings belong to the thread that does the work
        torch.set_grad_enabled(False)
        for index in list(self.held):
            self._drop(index)
        self.plan, self.saved = plan, {}
        for index in plan.blocks:
            with blame(unit_name(index)):
                self._hold(self.run.graph.blocks[index], collect=index in plan.collect)
        if plan.start == 0:
            self.decoder.load_embedding()

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
        outgoing = [self._through(hidden.to(self.device)) for hidden in incoming]
        if plan.save is not None:
            for sequence, hidden in zip(sequences, outgoing, strict=True):
                self.saved[sequence] = self.writers.submit(self.boundaries.save, plan.save, sequence, hidden.cpu())
            return None
        return None if plan.last else hidden_states.pack(outgoing)

    def end_forward(self) -> None:
        """Every sequence has passed: make boundary and moments durable, let go what only the passes needed."""
        plan = self._plan()
        if plan.save is not None:
            hashes = [self.saved[sequence].result() for sequence in sorted(self.saved)]
            self.boundaries.complete(plan.save, hashes)
        if plan.start == 0:
            self.decoder.drop_rest()
        for index in plan.blocks:
            self.decoder.drop_block(index)
            if index not in plan.collect:
                self._drop(index)
            elif plan.passes:
                self._keep_moments(self.held[index])

    def solve(self, index: int, generation: int) -> dict[str, Any] | None:
        """Solve every layer of a block, upload the result and commit it; returns a summary for the progress line.

        A block whose stored moments turn out to be damaged is left as it is, to be calibrated in another window:
        None is returned for it.

        Raises:
            CalibrationError: too many of a layer's input rows were NaN or Inf.
        """
        with blame(unit_name(index)):
            held = self.held[index]
            if not (self._plan().passes or self._recall_moments(held)):
                self._drop(index)
                return None
            return self._solve(held, unit_name(index), generation)

    def store_rest(self, generation: int) -> dict[str, Any]:
        """Read, check and commit every tensor outside the blocks, as the source has it."""
        with blame(REST):
            started = time.perf_counter()
            tensors = self.run.checkpoint.read(self.run.graph.rest)
            seconds = {"read": time.perf_counter() - started}
            held = _Held(Block(-1, REST, self.run.graph.rest, (), 0), tensors, {}, seconds)
            return _summary(self._commit(REST, generation, tensors, {}, [], held, None))

    def _hold(self, block: Block, *, collect: bool) -> None:
        started = time.perf_counter()
        tensors = self.run.checkpoint.read(block.tensors)
        self.decoder.load_block(block.index, tensors)
        held = _Held(block, tensors if collect else {}, {})
        if collect and self.run.calibrated:
            self._attach_moments(held, listen=self._plan().passes)
        held.seconds = {"read": time.perf_counter() - started, "calibrate": 0.0}
        self.held[block.index] = held

    def _solve(self, held: _Held, unit: str, generation: int) -> dict[str, Any]:
        started = time.perf_counter()
        solver = BlockSolver(self.run, held.block, held.source, held.moments, self.device)
        solved = solver.solve(self.threads)
        held.seconds["solve"] = time.perf_counter() - started
        replaced = {f"{layer['name']}.weight" for layer in solved.layers}
        kept = {name: tensor for name, tensor in held.source.items() if name not in replaced}
        record = self._commit(unit, generation, kept | solved.base, solved.adapter, solved.layers, held, self._plan())
        self._drop(held.block.index)
        return _summary(record)

    def _attach_moments(self, held: _Held, *, listen: bool) -> None:
        """One moment per shared input; where they are to ``listen``, fed by a hook on the first layer that reads it."""
        modules = self.decoder.linear_modules(held.block.index)
        for shared in shared_inputs(held.block, self.run.quantized):
            linear = shared[0]
            moment = InputMoment(
                linear.in_features, self.run.config.scaling, self.device, self._accumulator(linear.in_features)
            )
            held.moments[linear.input] = moment

            def add(module: nn.Module, args: tuple[Tensor], moment: InputMoment = moment) -> None:
                moment.update(args[0].reshape(-1, moment.features))

            if listen:
                modules[linear.input].register_forward_pre_hook(add)

    def _keep_moments(self, held: _Held) -> None:
        started = time.perf_counter()
        for name, moment in held.moments.items():
            self.statistics.save(name, moment, Path(self.scratch.name))
        held.seconds["write"] = time.perf_counter() - started

    def _recall_moments(self, held: _Held) -> bool:
        """Fill the moments from the statistics; False if one of them is not there any more, or damaged."""
        started = time.perf_counter()
        complete = all(self.statistics.load(name, moment) for name, moment in held.moments.items())
        held.seconds["read"] += time.perf_counter() - started
        return complete

    def _accumulator(self, features: int) -> Tensor | None:
        """Memory for a moment where the plan wants it; None for beside the weights."""
        shape = accumulator_shape(features, self.run.config.scaling)
        match self.placement:
            case "device":
                return None
            case "host":
                return torch.zeros(shape, dtype=torch.float64)
        path = Path(self.scratch.name) / uuid.uuid4().hex
        mapped = torch.from_file(str(path), shared=True, size=int(torch.Size(shape).numel()), dtype=torch.float64)
        path.unlink()  # the mapping keeps the space until the tensor goes
        return mapped.zero_().reshape(shape)

    def _enter(self, sequences: Sequence[int]) -> list[Tensor]:
        """Hidden states that enter the window, ``[1, T, d]`` each: embedded tokens, or the stored boundary."""
        start = self._plan().start
        assert start is not None
        if start:
            return [self.boundaries.load(start, sequence) for sequence in sequences]
        ids = torch.from_numpy(self.run.token_ids[list(sequences)]).to(self.device)
        return [self.decoder.embed(row.unsqueeze(0)) for row in ids]

    def _through(self, hidden: Tensor) -> Tensor:
        for index in self._plan().blocks:
            started = time.perf_counter()
            with blame(unit_name(index)):
                hidden = self.decoder.run_block(index, hidden)
            self.held[index].seconds["calibrate"] += time.perf_counter() - started
        return hidden

    def _commit(
        self,
        unit: str,
        generation: int,
        base: dict[str, Tensor],
        adapter: dict[str, Tensor],
        layers: list[dict[str, Any]],
        held: _Held,
        plan: StagePlan | None,
    ) -> BlockRecord:
        """Upload a unit's files under an attempt of their own, then create its record; the first record wins."""
        started = time.perf_counter()
        attempt = uuid.uuid4().hex
        files = {}
        for name, tensors in (("base", base), ("adapter", adapter)):
            if tensors:
                local = Path(self.scratch.name) / f"{attempt}-{name}"
                safetensors.torch.save_file(
                    {key: tensor.contiguous() for key, tensor in tensors.items()}, local, metadata={"format": "pt"}
                )
                files[name] = self.area.store.upload(
                    local, self.area.attempt_path(unit, attempt, f"{name}.safetensors")
                )
                local.unlink()
        seconds = held.seconds | {"write": held.seconds.get("write", 0.0) + time.perf_counter() - started}
        return self.area.commit(
            BlockRecord(
                unit=unit,
                generation=generation,
                fingerprint=self.run.fingerprint,
                attempt=attempt,
                files=files,
                layers=layers,
                source_sha256=_digest(held.source),
                seconds=seconds,
                versions=versions(),
                hardware=device_name(self.device),
                finished=time.time(),
                stage=self._stage_record(plan),
            )
        )

    def _stage_record(self, plan: StagePlan | None) -> dict[str, Any]:
        if plan is None:
            return {}
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


def _summary(record: BlockRecord) -> dict[str, Any]:
    """What the driver is told of a committed unit."""
    written = sum(entry.size for entry in record.files.values())
    return {"unit": record.unit, "layers": len(record.layers), "seconds": record.seconds, "bytes": written}


def _digest(tensors: dict[str, Tensor]) -> str:
    """sha256 of the source weights a unit was made from, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
