"""The plan of a run: windows, memory, bytes; what ``--dry-run`` and ``plan`` print and the stages are given."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from srr_dist.checkpoint.graph import Block, BlockGraph
from srr_dist.checkpoint.source import Checkpoint
from srr_dist.pipeline.cluster import Cluster
from srr_dist.pipeline.memory import Budget, Holding, Need, Workload, adapter_bytes, block_need, choose_holding, gib
from srr_dist.pipeline.run import Run, dtype_name
from srr_dist.pipeline.solve_memory import Solving
from srr_dist.pipeline.windows import Window, all_windows


@dataclass(frozen=True)
class Plan:
    """How a run is cut into windows and what it is expected to need."""

    run: Run
    cluster: Cluster
    needs: tuple[Need, ...]
    holding: Holding
    windows: tuple[Window, ...]
    """Of an undisturbed run from the first block."""

    def planned_memory(self) -> dict[str, int]:
        """Bytes a stage is expected to peak at."""
        return {"host": self.holding.host_bytes} | ({"gpu": self.holding.gpu_bytes} if self.cluster.gpus else {})

    def traffic(self) -> dict[str, int]:
        """Bytes read from the source and the store, and written to the store, by an undisturbed run."""
        boundaries = (len(self.windows) - 1) * self.run.token_ids.size * hidden_size(self.run.checkpoint)
        boundaries *= self.run.dtype.itemsize * (2 if self.run.config.sketch else 1)  # and as many of gradients
        return {
            "source read": self.run.checkpoint.total_bytes * (2 if self.run.config.mean_bits else 1),  # weighed before
            "boundaries written and read": boundaries,
            "result written": output_bytes(self.run),
        }

    def scratch_bytes(self) -> int:
        """Local disk that a worker needs for hidden states.

        To tune they are kept before and after each block that it holds, for the way back of gradients before the first.
        """
        states = self.run.token_ids.size * hidden_size(self.run.checkpoint) * self.run.dtype.itemsize
        return int(states) * (self.holding.blocks + 1 if self.run.config.tune_steps else bool(self.run.config.sketch))

    def describe(self) -> str:
        """The plan for a person."""
        run, holding = self.run, self.holding
        config, samples = run.config, run.token_ids.shape
        lines = [
            f"model          {run.checkpoint.model}",
            f"fingerprint    {run.fingerprint}",
            f"blocks         {len(run.graph.blocks)}, with {len(run.quantized)} linear layers to quantize"
            + (f" and {len(run.unquantized)} left as they are" if run.unquantized else ""),
            f"quantizer      {config.grid} {_widths(run)} bits, group {config.group_size}, {config.scales} scales, "
            f"{config.rounding} rounding" + (", rotated weights" if config.incoherence else ""),
            f"method         {config.method}, rank {config.rank}, split {config.split}, {config.form} form, "
            f"{config.iterations} iterations and {config.descent} of descent in the {config.rounding_metric} metric, "
            f"{config.scaling} scaling, shrinkage {config.shrinkage:g}, {config.tune_steps} tuning steps",
            f"calibration    {samples[0]} sequences of {samples[1]} tokens, forward passes in {dtype_name(run.dtype)}",
            f"workers        {self.cluster.workers} × ({self.cluster.cpus} CPU, {self.cluster.gpus} GPU)",
            f"windows        {len(self.windows)}, up to {holding.blocks} blocks per stage, "
            f"moments on {holding.placement}",
        ]
        if config.sketch:
            lines.append(f"sketch         {config.sketch}, {run.held_out} sequences held out")
        lines += [
            f"memory         {place} per worker: {gib(count)} planned, {gib(allowed)} allowed"
            for place, count, allowed in _places(self.planned_memory(), self.cluster.budget)
        ]
        if scratch := self.scratch_bytes():
            lines.append(f"scratch        {gib(scratch)} of local disk per worker, hidden states")
        lines += [f"{name:<30} {gib(count)}" for name, count in self.traffic().items()]
        lines += [f"window {i:<3} {describe_window(window)}" for i, window in enumerate(self.windows)]
        return "\n".join(lines)


def make_plan(run: Run, cluster: Cluster, blocks_per_stage: int) -> Plan:
    """Fit the run into the workers' memory.

    Raises:
        ConfigError: one block alone does not fit.
    """
    rank = adapter_rank(run)
    work = Workload(
        seq_len=run.token_ids.shape[1],
        hidden_size=hidden_size(run.checkpoint),
        compute_bytes=run.dtype.itemsize,
        scaling=run.config.scaling,
        quantized=run.quantized,
        on_gpu=bool(cluster.gpus),
        solving=Solving(
            feedback=run.config.rounding != "nearest",
            descent=run.config.descent > 0,
            downdated=rank > 0
            and run.config.iterations + run.config.descent > 0
            and run.config.rounding_metric == "downdated",
            code_bytes=run.grid.dtype.itemsize,
            tuned=run.config.tune_steps > 0,
            gated=run.config.rounding == "yaqa",
            band=run.config.sketch_band,
        ),
        bits=max(run.config.choices) if run.config.mean_bits else max(run.grid_of(name).bits for name in run.quantized),
        rank=rank,
        sketch=run.config.sketch,
        held_out=run.held_out,
        weighed=run.config.mean_bits > 0,
        vocabulary=run.checkpoint.config.get_text_config().vocab_size,
        threads=cluster.cpus,
        outside=rest_bytes(run.checkpoint, run.graph, run.dtype.itemsize),
    )
    needs = graph_needs(run.checkpoint, run.graph, work, dtype_name(run.dtype))
    per_stage = min(blocks_per_stage, -(-len(needs) // cluster.workers))
    holding = choose_holding(run.graph.blocks, needs, work, cluster.budget, per_stage)
    windows = all_windows(len(run.graph.blocks), cluster.workers, holding.blocks, passes=run.calibrated)
    return Plan(run, cluster, needs, holding, tuple(windows))


def smaller(plan: Plan) -> Plan | None:
    """The plan with half the blocks per stage; None where a stage holds one block already."""
    return make_plan(plan.run, plan.cluster, plan.holding.blocks // 2) if plan.holding.blocks > 1 else None


def graph_needs(checkpoint: Checkpoint, graph: BlockGraph, work: Workload, dtype: str) -> tuple[Need, ...]:
    """Each block's memory. The source's own tensors are kept beside the weights unless they are the same memory."""
    same = {"float32": ("F32", "GGUF"), "bfloat16": ("BF16",)}[dtype]
    needs = []
    for block in graph.blocks:
        entries = [checkpoint.tensors[name] for name in block.tensors]
        kept = sum(entry.nbytes for entry in entries if work.on_gpu or not entry.dtype.startswith(same))
        needs.append(block_need(block, kept, work))
    return tuple(needs)


def rest_bytes(checkpoint: Checkpoint, graph: BlockGraph, itemsize: int) -> int:
    """Bytes of the tensors outside the blocks, ``itemsize`` a value."""
    return sum(math.prod(checkpoint.tensors[name].shape) for name in graph.rest) * itemsize


def hidden_size(checkpoint: Checkpoint) -> int:
    """Width d of the hidden states."""
    return int(checkpoint.config.get_text_config().hidden_size)


def adapter_rank(run: Run) -> int:
    """Rank of the adapters, where layers are wide enough for it."""
    return 0 if run.config.method == "none" else run.config.rank


def output_bytes(run: Run) -> int:
    """Bytes of the result; what a block holds beside its packed layers and their adapters is small."""
    blocks = sum(block_output_bytes(run, block) for block in run.graph.blocks)
    return int(blocks) + sum(run.checkpoint.tensors[name].nbytes for name in run.graph.rest)


def block_output_bytes(run: Run, block: Block) -> float:
    """Bytes of a block's packed layers and their adapters."""
    rank = adapter_rank(run)
    layers = [linear for linear in block.linears if linear.name in run.quantized]
    mean = run.config.mean_bits
    more = mean - run.config.bits if mean else 0.0
    return sum(
        m * n * (run.grid_of(name).bits_per_weight(n) + more) / 8 + adapter_bytes(m, n, rank)
        for name, m, n in ((linear.name, linear.out_features, linear.in_features) for linear in layers)
    )


def _widths(run: Run) -> str:
    """``3``, or of several ``3 (180 layers), 4 (30 layers)``; ``3.5 (mean)`` where layers will have what they need."""
    if run.config.mean_bits:
        return f"{run.config.mean_bits:g} (mean)"
    counts = Counter(run.config.bits_of(name) for name in run.quantized)
    several = ", ".join(f"{bits} ({count} layers)" for bits, count in sorted(counts.items()))
    return several if len(counts) > 1 else str(*counts)


def describe_window(window: Window) -> str:
    """The blocks of each stage."""
    return " | ".join(f"blocks {stage[0]}–{stage[-1]}" for stage in window.stages)


def _places(planned: dict[str, int], budget: Budget) -> Sequence[tuple[str, int, int]]:
    return [(place, count, budget.host if place == "host" else budget.gpu or 0) for place, count in planned.items()]
