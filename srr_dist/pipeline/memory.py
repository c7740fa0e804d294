"""What a block needs in memory, and how many blocks a stage may hold: pure arithmetic, no device is touched.

A stage keeps, for every block it holds, the source's own weights, from which the solver works, and one moment per
shared input. While sequences pass there are beside them the weights in the type of the forward pass, where that is
another type or another device, and one block's activations. Then these go, and solving a layer takes a handful of
matrices of its size (``solve_memory``); what is solved is packed when the last layer of its block is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from srr_dist.calibration import moment_bytes, waiting_bytes
from srr_dist.calibration.head import tokens_at_once
from srr_dist.calibration.sketches import held_out_bytes, sketch_bytes, sketch_waiting_bytes
from srr_dist.checkpoint.graph import Block, shared_inputs
from srr_dist.errors import ConfigError
from srr_dist.pipeline.solve_memory import Solving, solve_bytes, solve_bytes_beside

PROCESS_BYTES = 700 * 2**20
"""Host memory of a worker that has imported torch and transformers and holds nothing yet (measured: 520 to 640 MiB)."""

_PACKING_BYTES = 5
"""For each code of the largest layer: as a level in two bytes, and in runs of eight as they are, shifted and joined."""

_WEIGHING_BYTES = 24
"""For each weight of a layer in float32: itself, its squared gradients, and four while its codes become an error."""

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
    solving: Solving = field(default_factory=Solving)
    """How layers are solved."""
    bits: int = 0
    """Of a code, of the widest where layers differ."""
    rank: int = 0
    """Of the adapters."""
    sketch: str = ""
    """Kind of the sketches that gradients are summed in, "" for none."""
    held_out: int = 0
    """Sequences that these do not see."""
    weighed: bool = False
    """Whether gradients are asked what codes of each width do, before layers are solved."""
    vocabulary: int = 1
    """Of the head, where gradients begin."""
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
    """In the type of the forward passes; kept until the sequences have passed."""
    source: int
    """Host copy of the source's own tensors, 0 where the forward pass uses the very same; or of held-out gradients."""
    moments: int
    """Of inputs; or sketches, where these are larger: a window gathers the ones or the others."""
    forward: int
    products: int
    """Where moments are: of one sequence's inputs with themselves, before they are added."""
    solve: int
    """Moments not included."""
    solve_beside: int
    """The same where moments lie beside, with what is still there of this block's."""
    results: int
    """Host memory of what was solved."""
    packing: int
    """Host memory to pack it and write it down, once the block is solved."""
    recalled: int = 0
    """On the host, sums of the sketch with which a layer is solved on a GPU, or gradients by which it is weighed."""
    passing: int = 0
    """Rows that wait to be summed, and what autograd keeps of a pass until gradients come back from behind."""


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
    weights, groups = parameters(block), shared_inputs(block, work.quantized)
    layers = [linear for group in groups for linear in group]
    widths = [group[0].in_features for group in groups]
    moments = sum(moment_bytes(features, work.scaling) for features in widths)
    outputs = sum(linear.out_features for linear in block.linears) + 8 * work.hidden_size
    forward = work.seq_len * (outputs * work.compute_bytes + 4 * max(widths, default=0))
    products = max(widths, default=0) ** 2 if work.scaling == "exact" else 0  # a quarter of the rows in float32
    at_once = layers_at_once(block, work.quantized, work.threads, on_gpu=work.on_gpu)
    solve = solve_bytes(groups, work.solving, work.scaling, at_once, on_gpu=work.on_gpu)
    beside = solve_bytes_beside(groups, work.solving, work.scaling, at_once)
    if work.solving.tuned:
        tune = _tune_bytes(weights, forward, 1 if work.on_gpu else work.threads)
        solve, beside = max(solve, tune), max(beside, moments + tune)
    results = sum(_result_bytes(linear.out_features, linear.in_features, work) for linear in layers)
    packing = sum(_packed_bytes(linear.out_features, linear.in_features, work) for linear in layers)
    packing += _PACKING_BYTES * max((linear.out_features * linear.in_features for linear in layers), default=0)
    passing = sum(waiting_bytes(work.seq_len, features, work.scaling) for features in widths)
    shapes, band = [(linear.out_features, linear.in_features) for linear in layers], work.solving.band
    if work.sketch:
        moments = max(moments, sum(sketch_bytes(work.sketch, m, n, band) for m, n in shapes))
        source = max(source, work.held_out * sum(held_out_bytes(work.seq_len, m, n) for m, n in shapes))
        passing = 2 * forward
        passing += sum(sketch_waiting_bytes(work.sketch, work.seq_len, m, n, band) for m, n in shapes)
        forward += max((_back_bytes(m, n, work) for m, n in shapes), default=0)
    recalled = work.solving.gated * max((sketch_bytes(work.sketch, m, n, band) for m, n in shapes), default=0)
    if work.weighed:
        gradients = max((work.held_out * held_out_bytes(work.seq_len, m, n) for m, n in shapes), default=0)
        weigh = gradients * (not work.on_gpu) + max((_WEIGHING_BYTES * m * n for m, n in shapes), default=0)
        solve, beside, recalled = max(solve, weigh), max(beside, weigh), max(recalled, gradients)
    kept = work.copies * weights * work.compute_bytes
    return Need(kept, source, moments, forward, products, solve, beside, results, packing, recalled, passing)


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
    beside = placement == PLACEMENTS[0 if work.on_gpu else 1]
    moments = [need.moments for need in largest]
    products, results = max(need.products for need in needs), max(need.results for need in needs)
    packing = results + max(need.packing for need in needs)
    passing = work.outside + sum(need.weights + need.passing for need in largest) + max(need.forward for need in needs)
    solving = max(need.solve for need in needs)
    if beside:
        passing += sum(moments)
        solving = sum(moments[1:]) + max(need.solve_beside for need in needs)
    host = PROCESS_BYTES + sum(need.source for need in largest)
    if work.on_gpu:
        away = sum(moments) if placement == "host" else 0
        host += work.outside + away + packing + max(need.recalled for need in needs)
        return host + products * (not beside), max(passing + products * beside, solving)
    solving += results + sum(need.weights for need in largest if not need.source)
    return host + max(passing + products, solving, packing + sum(moments[1:]) * beside), 0


def _tune_bytes(weights: int, forward: int, threads: int) -> int:
    """What is alive while a block is tuned, in float32.

    Latent values with their gradient and its two moments, weights to try, and the sum of gradients; each sequence that
    is passed back has gradients of its own, and keeps what layers read.
    """
    return weights * 4 * (6 + threads) + threads * 3 * forward


def _back_bytes(m: int, n: int, work: Workload) -> int:
    """In float32 while one layer's gradients are added: G or what tokens are multiplied by, inputs, gradients, a panel.

    At the end of the model it is logits instead: scores and their gradient, probabilities, and their float64 sums.
    """
    tokens = work.seq_len
    through = max(m * n, tokens * (tokens + max(m, n)))
    logits = min(tokens, tokens_at_once(work.vocabulary)) * work.vocabulary
    return max(4 * (through + tokens * (m + n) + max(m, n) ** 2 // 4), 24 * logits)


def _result_bytes(out_features: int, in_features: int, work: Workload) -> int:
    """Codes with their adapter."""
    return out_features * in_features * work.solving.code_bytes + adapter_bytes(out_features, in_features, work.rank)


def _packed_bytes(out_features: int, in_features: int, work: Workload) -> int:
    """Packed codes, and once more the bytes of them and of the adapter that go into a file."""
    return out_features * in_features * work.bits // 4 + adapter_bytes(out_features, in_features, work.rank)
