"""How much a run computes, counted from shapes and options: what the forecast divides by the rates of some hardware.

A product of ``[a, b]`` and ``[b, c]`` is ``2 a b c`` operations. What is small beside
the rest at every size is left out. Letters are those of ``srr_dist.solve``: W ``[m, n]``, rank r, b columns to a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields

from srr_dist.calibration.sketches import output_bands, sketch_operations, sketch_passes
from srr_dist.checkpoint.graph import Block, shared_inputs
from srr_dist.pipeline.memory import parameters
from srr_dist.solve import Quantizer, SolveOptions
from srr_dist.solve.descent import PARTS
from srr_dist.solve.lowrank import START_STEPS, block_size
from srr_dist.solve.scales import FIT_STEPS
from srr_dist.solve.split import coarse_candidates, refined_candidates

STEPS = 4
"""Of the block Krylov space on the average: three to six in small random models, and ten are allowed."""

_TRIAL_BYTES = 70
"""Read and written for each weight and each scale that is tried."""
_ENCODE_BYTES = 30
_LOOKUP_BYTES = 130
"""The same in addition where codes are looked up in a table."""
_RESIDUAL_BYTES = 70
"""The same to form W − P_k, Q and W − Q and to add up an energy."""
_FEEDBACK_BYTES = 180
"""The same while errors go from input to input, inside a range of 32."""
_FIT_BYTES = 40
"""The same for a step of conjugate gradients."""
_FEEDBACK_CALLS = 9
"""Operations on one input's weights."""
_TRIAL_CALLS, _TRIAL_CHUNK = 12, 2**18
_SQUARE_BYTES = 28
"""Read and written for each weight to square a gradient, to see that it is finite, and to add it to those before."""
_UPDATE_BYTES = 160
"""Read and written for each weight by a tuning step: what it is multiplied with, its gradients, Adam."""
_CHECKS = 6
"""Times that tuning measures the sequences held out."""
_PACK_BYTES = 40
"""Read and written on the host to pack a code."""


@dataclass(frozen=True)
class Work:
    """Amounts of each kind of work. A kind is what runs at one rate on given hardware."""

    forward: float = 0.0
    """Operations of the blocks' passes, in the passes' own type."""
    moments: float = 0.0
    """Operations of ``xᵀ x``: from the passes' type to float32."""
    products: float = 0.0
    """Operations of the solver's float32 products of wide matrices."""
    narrow: float = 0.0
    """Operations of its float32 products with a block of columns."""
    thin: float = 0.0
    """Operations of float64 products with a thin matrix."""
    reflections: float = 0.0
    """Operations of float64 Householder factorizations of thin matrices."""
    cholesky: float = 0.0
    """Operations of float64 Cholesky factorizations."""
    eigen: float = 0.0
    """Cubes of the orders of float64 eigenproblems, solved on one CPU thread."""
    elementwise: float = 0.0
    """Bytes read and written by operations on whole matrices."""
    feedback: float = 0.0
    """Bytes read and written while error feedback goes from input to input."""
    calls: float = 0.0
    """Operations so small that starting them takes longest."""
    draws: float = 0.0
    """Random numbers, drawn on one CPU thread."""
    host: float = 0.0
    """Bytes read and written by one CPU thread."""
    digest: float = 0.0
    """Bytes that go through sha256."""
    link: float = 0.0
    """Bytes between host and GPU."""
    read: float = 0.0
    """Bytes from storage to one worker."""
    write: float = 0.0
    """Bytes from one worker to storage."""

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(amount * times for amount in astuple(self)))

    def seconds(self, rates: Mapping[str, float]) -> float:
        """One kind after the other, each at its rate per second."""
        return float(sum(amount / rates[kind] for kind, amount in zip(KINDS, astuple(self), strict=True) if amount))


KINDS = tuple(field.name for field in fields(Work))


def total(works: Iterable[Work]) -> Work:
    """Their sum."""
    return sum(works, Work())


def krylov(m: int, b: int, steps: int, product: Work) -> Work:
    """Leading eigenvectors of a matrix of order m from a block of b columns; ``product``: the matrix times a block."""
    found = product * steps + Work(reflections=4 * m * b * b)
    for step in range(1, steps + 1):
        found += Work(thin=2 * m * step * b * b, eigen=(step * b) ** 3)
        if step < steps:  # twice beyond the basis so far
            found += Work(thin=2 * 4 * m * step * b * b, reflections=2 * 4 * m * b * b)
    return found + Work(thin=2 * m * steps * b * b)


@dataclass(frozen=True)
class LayerWork:
    """What it takes to solve one layer.

    Attributes:
        m, n: outputs and inputs.
        options: of the solver.
        full: whether its moment is a matrix, not a diagonal.
        bands: blocks of the output side, where its metric has one.
    """

    m: int
    n: int
    options: SolveOptions
    full: bool
    bands: int = 1

    @property
    def rank(self) -> int:
        """The rank r of this layer."""
        return 0 if self.options.method == "none" else min(self.options.rank, self.m, self.n)

    @property
    def block(self) -> int:
        """Columns b to a block."""
        return block_size(self.m, self.n, self.rank)

    def solve(self, *, across: bool = False) -> Work:
        """The layer from its weight and metric to its stored factors; ``across``: descent is in a metric of two sides.

        Their other work beyond that of one side is ``two_sided``'s.
        """
        m, n, r = self.m, self.n, self.rank
        work = self.tried() + self.iteration() * (self.options.iterations if r else 0)
        work += self.descent(across=across) * (self.options.descent if self.full else 0)
        work += Work(link=2 * m * n) + self._with_moment(r) + Work(narrow=2 * m * n * r)
        if self.options.method != "srr":
            return work + self.energy()
        return work + self.subspace() * 2 + Work(draws=m * n)  # of W, and of random numbers for the criterion

    def two_sided(self) -> Work:
        """The layer once more in the metric of its sketch, where errors go from output to output as well."""
        rounded = self.candidates()[1] + (self.options.iterations if self.rank else 0)
        across = Work(products=self._pairs * self.n) + self._fed(self.options.quantizer)
        factors = factored(self.m // self.bands) * self.bands + factored(self.n)
        return self.solve(across=True) + factors + across * rounded

    def tried(self) -> Work:
        """The k that are tried."""
        compared, judged = self.candidates()
        quantizer = self.options.quantizer
        return self.candidate(Quantizer(quantizer.grid)) * compared + self.candidate(quantizer) * judged

    def candidates(self) -> tuple[int, int]:
        """How many k the plainest quantizer compares in a search, and how many the whole one solves, at most."""
        if self.options.method != "srr":
            return 0, 1
        if self.options.split != "search":
            return 0, 2 if self.options.split == "criterion" else 3
        searched = len(coarse_candidates(self.rank)) + 1 + len(refined_candidates(self.rank // 2, self.rank))
        return searched, 0 if self.options.quantizer == Quantizer(self.options.quantizer.grid) else 3

    def candidate(self, quantizer: Quantizer) -> Work:
        """One k: the residual quantized, and what is left approximated."""
        preserved = Work(narrow=self.m * self.n * self.rank)  # k is half of r on the average
        return preserved + self.rounding(quantizer) + (self.subspace() if self.rank else self.energy())

    def iteration(self) -> Work:
        """Codes anew beside the adapter, and the adapter beside the codes."""
        quantizer = self.options.quantizer
        again = self.full and self.options.rounding_metric == "downdated" and quantizer.rounding != "nearest"
        return self._beside() + self.rounding(quantizer) + self.subspace() + (factored(self.n) if again else Work())

    def descent(self, *, across: bool = False) -> Work:
        """Codes and scales one after the other beside the adapter, and the adapter beside the codes."""
        m, n, quantizer = self.m, self.n, self.options.quantizer
        work = self._beside(across=across) + self._fed(quantizer)
        work += Work(products=3 * m * n * n, elementwise=m * n * _RESIDUAL_BYTES)
        if across:  # what other rows add to a part's targets, and how the error changes
            calls = (PARTS - 1) * n * self.bands * _FEEDBACK_CALLS
            work += Work(products=2 * m * n * n + (2 + 2 / PARTS) * self._pairs * n, calls=calls)
        if quantizer.fits:
            work += self.fit() if across else Work(products=2 * m * n * n)
        return work + (self.subspace() if self.rank else self.energy())

    def fit(self) -> Work:
        """Scales that fit codes in both sides of a metric."""
        m, n = self.m, self.n
        step = Work(products=2 * n * (self._pairs + m * n), elementwise=m * n * _FIT_BYTES)
        return step * (FIT_STEPS + 1) + (self.energy() + Work(products=self._pairs * n)) * 2

    def _beside(self, *, across: bool = False) -> Work:
        """What the adapter leaves, and the metric in which it is quantized; ``across``: beyond L as well as R."""
        m, n, r = self.m, self.n, self.rank
        work = Work(narrow=2 * m * n * r)
        if not (r and self.full and self.options.rounding_metric == "downdated"):
            return work
        work += self._with_moment(r) + _downdated(n, r)
        if not across:
            return work
        width = m // self.bands
        return work + Work(narrow=2 * self._pairs * r) + (_downdated(width, r) + factored(width)) * self.bands

    @property
    def _pairs(self) -> int:
        """Of outputs that have to do with each other."""
        return self.m * self.m // self.bands

    def rounding(self, quantizer: Quantizer) -> Work:
        """Scales, codes, and their difference from the weight."""
        m, n = self.m, self.n
        trials = len(quantizer.grid.trials) if quantizer.scales == "search" else 0
        chunks = -(-m * n // _TRIAL_CHUNK)
        lookup = _LOOKUP_BYTES if quantizer.grid.codebook else 0
        work = Work(elementwise=m * n * (_RESIDUAL_BYTES + _ENCODE_BYTES + lookup))
        trial = Work(elementwise=m * n * (_TRIAL_BYTES + lookup), calls=chunks * _TRIAL_CALLS)
        work += trial * (trials + 1 if trials else 0)
        if quantizer.rounding != "nearest" and self.full:
            work += Work(products=m * n * n) + self._fed(quantizer)
        return work

    def _fed(self, quantizer: Quantizer) -> Work:
        """Errors going from input to input."""
        weights, lookup = self.m * self.n, _LOOKUP_BYTES if quantizer.grid.codebook else 0
        return Work(feedback=weights * (_FEEDBACK_BYTES + lookup), calls=self.n * _FEEDBACK_CALLS)

    def subspace(self) -> Work:
        """The leading directions of an ``[m, n]`` matrix in the metric, and its energy."""
        m, n, b = self.m, self.n, self.block
        product = Work(narrow=4 * m * n * b) + self._with_moment(b)
        return self.energy() + Work(narrow=4 * m * n * b) + krylov(m, b, STEPS, product)

    def energy(self) -> Work:
        """``tr(E H Eᵀ)``: each pair of inputs once, in eight panels."""
        m, n = self.m, self.n
        return Work(products=1.125 * m * n * n, elementwise=20 * m * n) if self.full else Work(elementwise=20 * m * n)

    def _with_moment(self, columns: int) -> Work:
        return Work(narrow=2 * self.n**2 * columns) if self.full else Work(elementwise=12 * self.n * columns)


def metric(n: int, blocks: Iterable[int], options: SolveOptions, *, full: bool) -> Work:
    """What layers of n inputs share: H itself, where their searches begin (b columns each), and the factor of H."""
    if not full:
        return Work()
    product = Work()
    for b in set(blocks):
        once = Work(narrow=2 * n * n * b)
        product += once + Work(draws=n * b) + krylov(n, b, START_STEPS, once)
    feedback = options.quantizer.rounding != "nearest"
    return Work(elementwise=34 * n * n) + product + (factored(n) if feedback else Work())


def _downdated(n: int, rank: int) -> Work:
    """A moment less what an adapter holds of it."""
    return Work(thin=2 * n * n * rank + 2 * n * rank * rank, elementwise=40 * n * n)


def factored(n: int) -> Work:
    """The Cholesky factor of a moment, with what is copied around it."""
    return Work(cholesky=n**3 / 3, elementwise=56 * n * n)


def solving(block: Block, quantized: frozenset[str], options: SolveOptions, *, full: bool, band: int = 0) -> list[Work]:
    """What each group of a block's layers that share an input takes, in the block's order."""
    gated = options.quantizer.rounding == "yaqa"
    groups = [
        [
            LayerWork(each.out_features, each.in_features, options, full, output_bands(each.out_features, band))
            for each in linears
        ]
        for linears in shared_inputs(block, quantized)
    ]
    return [
        total(layer.solve() + (layer.two_sided() if gated else Work()) for layer in layers)
        + metric(layers[0].n, (layer.block for layer in layers if layer.rank), options, full=full)
        for layers in groups
    ]


def weighing(
    block: Block, quantized: frozenset[str], quantizer: Quantizer, *, widths: int, held_out: int, seq_len: int
) -> Work:
    """Each layer rounded to codes of so many widths, and the squares of gradients, formed from tokens, summed once."""
    options, weights = SolveOptions("none", quantizer, 0), _weights(block, quantized)
    layers = [linear for linear in block.linears if linear.name in quantized]
    rounded = (
        LayerWork(each.out_features, each.in_features, options, full=False).rounding(quantizer) for each in layers
    )
    squares = Work(products=2 * seq_len * weights, elementwise=weights * _SQUARE_BYTES)
    return total(rounded) * widths + squares * held_out


def passing(block: Block, seq_len: int, hidden_size: int) -> Work:
    """One sequence through a block: its linear layers, and causal attention over it."""
    return Work(forward=2 * seq_len * parameters(block) + 2 * seq_len**2 * hidden_size)


def sketching(block: Block, quantized: frozenset[str], kind: str, band: int, seq_len: int, once: Work) -> Work:
    """One sequence of gradients back through a block, which is run again (``once``) in every pass, and its sketches."""
    shapes = [(linear.out_features, linear.in_features) for linear in block.linears if linear.name in quantized]
    summed = sum(sketch_operations(kind, seq_len, m, n, band) for m, n in shapes)
    return once * (3 * sketch_passes(kind)) + Work(moments=summed)


def moments(block: Block, quantized: frozenset[str], seq_len: int, scaling: str, *, away: bool) -> Work:
    """One sequence added to the moments of a block, which may lie away from the GPU.

    Of each matrix the lower triangle in four panels: five eighths.
    """
    widths = {linear.input: linear.in_features for linear in block.linears if linear.name in quantized}.values()
    if scaling != "exact":
        return Work(elementwise=sum(12 * seq_len * n for n in widths) if scaling != "identity" else 0)
    entries = sum(0.625 * n * n for n in widths)
    work = Work(moments=2 * seq_len * entries)
    return work + (Work(link=4 * entries, host=32 * entries) if away else Work(elementwise=32 * entries))


def tuning(block: Block, quantized: frozenset[str], one: Work, *, rank: int, steps: int, batch: int, held: int) -> Work:
    """Gradient steps on all layers of a block; ``one``: a sequence's pass, which takes twice that to go back."""
    if not steps:
        return Work()
    weights = _weights(block, quantized)
    step = one * (3 * batch) + Work(narrow=6 * weights * rank, elementwise=weights * (_UPDATE_BYTES + 8 * batch))
    return step * steps + one * (_CHECKS * held)


def storing(block: Block, quantized: frozenset[str]) -> Work:
    """A solved block, packed on the host; the source it was made from goes through sha256."""
    return Work(host=_weights(block, quantized) * _PACK_BYTES, digest=block.nbytes)


def _weights(block: Block, quantized: frozenset[str]) -> int:
    """Of the layers that are quantized."""
    return sum(linear.out_features * linear.in_features for linear in block.linears if linear.name in quantized)
