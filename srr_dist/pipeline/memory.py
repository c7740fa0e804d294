"""What a block needs in memory, and how many blocks a stage may hold: pure arithmetic, no device is touched.

A stage keeps, for every block it holds, the weights in the type of the forward pass (and, where that is another type
or another device, the source's own, from which the solver works), and one moment per shared input. While it runs a
sequence it needs that block's activations; while it solves a layer, a handful of matrices of the layer's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srr_dist.calibration import moment_bytes
from srr_dist.calibration.head import LOGITS_AT_ONCE
from srr_dist.calibration.sketches import held_out_bytes, sketch_bytes
from srr_dist.checkpoint.graph import Block
from srr_dist.errors import ConfigError

PROCESS_BYTES = 700 * 2**20
"""Host memory of a worker that has imported torch and transformers and holds nothing yet (measured: 520 to 640 MiB)."""

SMALL_LAYER = 4 * 2**20
"""Weights of a layer up to which it is solved beside others."""

PLACEMENTS = ("device", "host", "disk")
"""Where moments may live, fastest first: beside the weights, in host memory, mapped from a local disk."""


@dataclass(frozen=True)
class Workload:
    """What a run asks of each block."""

    seq_len: int
    hidden_size: int
    compute_bytes: int
    """Bytes of a value in the forward pass."""
    scaling: str
    quantized: frozenset[str]
    """Full names of the layers to solve."""
    on_gpu: bool
    feedback: bool = False
    """Whether moments are factored for rounding with error feedback."""
    downdated: bool = False
    """Whether that happens for each layer, beyond its adapter."""
    bits: int = 0
    """Of a code."""
    code_bytes: int = 1
    """Of a code that is not packed."""
    rank: int = 0
    """Of the adapters."""
    tuned: bool = False
    """Whether blocks are tuned against their outputs."""
    sketch: str = ""
    """Kind of the sketches that gradients are summed in, "" for none."""
    held_out: int = 0
    """Sequences that these do not see."""
    threads: int = 1
    """Of a worker without a GPU: so many small layers are solved at once, and sequences passed back."""
    copies: int = 1
    """Versions of each block held side by side: two while an original and a quantized model are compared."""
    outside: int = 0
    """Bytes of the tensors outside the blocks, which the first stage holds while it embeds the tokens."""


@dataclass(frozen=True)
class Need:
    """Bytes a block needs: kept as long as the stage holds it, and in passing."""

    weights: int
    source: int
    """Host copy of the source's own tensors, 0 where the forward pass uses the very same; or of held-out gradients."""
    moments: int
    """Of inputs; or sketches, where these are larger: a window gathers the ones or the others."""
    forward: int
    solve: int
    results: int
    """Host memory of what was solved, until it is durable."""
    graph: int = 0
    """What autograd keeps of a sequence's pass until its gradient comes back through the blocks behind."""


@dataclass(frozen=True)
class Budget:
    """Bytes one worker may use; ``gpu`` is None on a CPU."""

    host: int
    gpu: int | None


@dataclass(frozen=True)
class Holding:
    """How a stage holds blocks: at most this many, with moments placed there; bytes it is expected to peak at."""

    blocks: int
    placement: str
    host_bytes: int
    gpu_bytes: int


def block_need(block: Block, source: int, work: Workload) -> Need:
    """The memory of one block under a workload; ``source`` as in Need."""
    weights = work.copies * parameters(block) * work.compute_bytes
    layers = [linear for linear in block.linears if linear.name in work.quantized]
    inputs = {linear.input: linear.in_features for linear in layers}
    moments = sum(moment_bytes(features, work.scaling) for features in inputs.values())
    outputs = sum(linear.out_features for linear in block.linears) + 8 * work.hidden_size
    forward = work.seq_len * (outputs * work.compute_bytes + 4 * max(inputs.values(), default=0))
    solve = max((_solve_bytes(linear.out_features, linear.in_features, work) for linear in layers), default=0)
    solve *= layers_at_once(block, work.quantized, work.threads, on_gpu=work.on_gpu)
    if work.tuned:
        solve = max(solve, _tune_bytes(parameters(block), forward, 1 if work.on_gpu else work.threads))
    if work.sketch:
        shapes = [(linear.out_features, linear.in_features) for linear in layers]
        moments = max(moments, sum(sketch_bytes(work.sketch, m, n) for m, n in shapes))
        source = max(source, work.held_out * sum(held_out_bytes(work.seq_len, m, n) for m, n in shapes))
        solve = max(solve, forward + max((_back_bytes(m, n, work.seq_len) for m, n in shapes), default=0))
    results = sum(_result_bytes(linear.out_features, linear.in_features, work) for linear in layers)
    return Need(weights, source, moments, forward, solve, results, graph=2 * forward if work.sketch else 0)


def choose_holding(
    blocks: Sequence[Block], needs: Sequence[Need], work: Workload, budget: Budget, most: int
) -> Holding:
    """The fastest placement, and with it the most blocks (at most ``most``), that the budget allows.

    Raises:
        ConfigError: not even one block fits; the message names the block, what it needs and what there is.
    """
    placements = PLACEMENTS if work.on_gpu else PLACEMENTS[1:]
    for placement in placements:
        for count in range(min(most, len(blocks)), 0, -1):
            host, gpu = _peak(needs, count, placement, work)
            if host <= budget.host and gpu <= (budget.gpu or 0):
                return Holding(count, placement, host, gpu)
    host, gpu = _peak(needs, 1, placements[-1], work)
    name, needed, allowed = "host_memory", host, budget.host
    if budget.gpu is not None and gpu > budget.gpu:
        name, needed, allowed = "gpu_memory", gpu, budget.gpu
    largest = max(zip(needs, blocks, strict=True), key=lambda pair: pair[0].weights + pair[0].solve)[1]
    raise ConfigError(
        f"{name}: one block at a time ({largest.name}, sequences of {work.seq_len} tokens) needs {gib(needed)}, "
        f"allowed are {gib(allowed)}; allow more, use fewer --workers on a host, or a shorter --seq-len"
    )


def layers_at_once(block: Block, quantized: frozenset[str], threads: int, *, on_gpu: bool) -> int:
    """How many layers of a block are solved at once.

    A layer of a small model is too little work for several threads; a large one keeps them busy by itself.
    """
    layers = [linear for linear in block.linears if linear.name in quantized]
    if on_gpu or any(linear.out_features * linear.in_features > SMALL_LAYER for linear in layers):
        return 1
    return max(1, min(threads, len({linear.input for linear in layers})))


def parameters(block: Block) -> int:
    """Weights of a block's linear layers."""
    return sum(linear.out_features * linear.in_features for linear in block.linears)


def adapter_bytes(out_features: int, in_features: int, rank: int) -> int:
    """L and R of a layer in bfloat16, of that rank at most."""
    return 2 * min(rank, out_features, in_features) * (out_features + in_features)


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB"


def _peak(needs: Sequence[Need], count: int, placement: str, work: Workload) -> tuple[int, int]:
    """Host and GPU bytes at the peak of a stage that holds ``count`` of the largest blocks."""
    largest = sorted(needs, key=lambda need: need.weights + need.source + need.moments, reverse=True)[:count]
    weights = sum(need.weights + need.graph for need in largest)
    moments = sum(need.moments for need in largest)
    passing = max(max(need.forward, need.solve) for need in needs)
    results = max(need.results for need in needs)
    host = PROCESS_BYTES + results + sum(need.source for need in largest) + (moments if placement == "host" else 0)
    if work.on_gpu:
        return host + work.outside, work.outside + weights + passing + (moments if placement == "device" else 0)
    return host + work.outside + weights + passing, 0


def _tune_bytes(weights: int, forward: int, threads: int) -> int:
    """What is alive while a block is tuned, in float32.

    Latent values with their gradient and its two moments, weights to try, and the sum of gradients; each sequence that
    is passed back has gradients of its own, and keeps what layers read.
    """
    return weights * 4 * (6 + threads) + threads * 3 * forward


def _back_bytes(m: int, n: int, tokens: int) -> int:
    """In float32 while one layer's gradients are added: G or what tokens are multiplied by, inputs, gradients, a panel.

    At the end of the model it is logits instead: scores and their gradient, probabilities, and their float64 sums.
    """
    through = max(m * n, tokens * (tokens + max(m, n)))
    return max(4 * (through + tokens * (m + n) + max(m, n) ** 2 // 4), 24 * LOGITS_AT_ONCE)


def _solve_bytes(out_features: int, in_features: int, work: Workload) -> int:
    """Matrices alive while a layer is solved: W, residual, Q, E, E H and one more, codes; H in float32 and float64.

    To factor H takes two more in float64 instead of one, and beyond an adapter H itself and its factor stay beside it.
    """
    weights = out_features * in_features * (6 * 4 + 2 * work.code_bytes)
    if work.scaling != "exact":
        return weights + in_features * 12
    return weights + in_features * in_features * (12 + 8 * work.feedback + 8 * work.downdated)


def _result_bytes(out_features: int, in_features: int, work: Workload) -> int:
    """Codes with their adapter, and what is packed of this block and of the one that is uploaded."""
    adapter = adapter_bytes(out_features, in_features, work.rank)
    return out_features * in_features * (4 * work.code_bytes + work.bits) // 4 + 3 * adapter
