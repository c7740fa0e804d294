"""Tuning a block: each step against plain float64, the best iterate kept, the same numbers every time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from srr_dist.solve import Grid, Metric, Quantizer, SolveOptions, TuneOptions, make_grid, remeasured, solve_layer, tune
from srr_dist.solve.layer import LayerSolution, Stored
from srr_dist.solve.tuning import LEANING, TunedLayer

M, N, TOKENS = 24, 32, 40


class TwoLayers:
    """A block ``y = gelu(x W₁ᵀ) W₂ᵀ`` and its mean squared error over sequences of random tokens."""

    def __init__(self, sequences: int = 16, width: int = M) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = {"first": (width, N), "second": (N, width)}
        self.W = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
        self.x = torch.randn(sequences, TOKENS, N, generator=generator)
        self.y = self._run(self.W, self.x)
        self.seen: list[list[int]] = []

    def value(self, weights: Mapping[str, Tensor], sequences: Sequence[int]) -> float:
        return float(self._loss(weights, sequences))

    def gradients(self, weights: Mapping[str, Tensor], sequences: Sequence[int]) -> Mapping[str, Tensor]:
        self.seen.append(list(sequences))
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        with torch.enable_grad():
            slopes = torch.autograd.grad(self._loss(leaves, sequences), list(leaves.values()))
        return dict(zip(leaves, slopes, strict=True))

    def _loss(self, weights: Mapping[str, Tensor], sequences: Sequence[int]) -> Tensor:
        chosen = list(sequences)
        return (self._run(weights, self.x[chosen]) - self.y[chosen]).square().mean()

    @staticmethod
    def _run(W: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.nn.functional.gelu(x @ W["first"].mT) @ W["second"].mT


def code_range(grid: Grid, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest code of each group ``[m, groups, 1]``."""
    zero = grid.zero(codes)
    low, high = (torch.tensor(end) - (0 if zero is None else zero.unsqueeze(-1)) for end in grid.code_range)
    return low, high


def solved(block: TwoLayers, method: str = "srr", grid: str = "int", rank: int = 2) -> dict[str, LayerSolution]:
    options = SolveOptions(method, Quantizer(make_grid(grid, 2, 8)), rank, split="criterion")
    return {name: solve_layer(W, Metric(torch.ones(W.shape[1])), name, options) for name, W in block.W.items()}


@pytest.mark.parametrize("grid", ["int", "int-asym", "mxint"])
@pytest.mark.parametrize("method", ["srr", "none"])
def test_tuning_lowers_the_error_on_sequences_it_did_not_see(grid, method):
    block = TwoLayers()
    starts, kind = solved(block, method, grid), make_grid(grid, 2, 8)
    found = tune(block.W, starts, dict.fromkeys(block.W, kind), block, 16, TuneOptions(60))
    weights = {name: layer.weight(kind) for name, layer in found.layers.items()}
    assert found.error == block.value(weights, range(14, 16)) < 0.9 * found.error_before
    assert not {14, 15} & {sequence for batch in block.seen for sequence in batch}
    for layer in found.layers.values():
        low, high = code_range(kind, layer.codes)
        assert layer.codes.dtype == kind.dtype
        assert (low <= kind.grouped(layer.codes)).all()
        assert (kind.grouped(layer.codes) <= high).all()
        assert (layer.scale > 0).all()
        assert layer.L.dtype == layer.R.dtype == torch.bfloat16


def test_tuning_in_a_table_lowers_the_error_and_moves_codes_and_scales():
    block, kind = TwoLayers(width=64), make_grid("nf4", 4, 32)
    options = SolveOptions("none", Quantizer(kind), 0)
    starts = {name: solve_layer(W, Metric(torch.ones(W.shape[1])), name, options) for name, W in block.W.items()}
    found = tune(block.W, starts, dict.fromkeys(block.W, kind), block, 16, TuneOptions(60))
    weights = {name: layer.weight(kind) for name, layer in found.layers.items()}
    assert found.error == block.value(weights, range(14, 16)) < 0.9 * found.error_before
    for name, layer in found.layers.items():
        assert int(layer.codes.min()) >= 0 and int(layer.codes.max()) <= 15
        assert not torch.equal(layer.codes, starts[name].codes)
        assert not torch.equal(layer.scale, starts[name].scale)


def test_scales_move_where_the_grid_has_any_value_and_stay_powers_of_two_where_not():
    block = TwoLayers()
    for grid, moved in (("int", True), ("int-asym", True), ("mxint", False)):
        starts = solved(block, grid=grid)
        found = tune(block.W, starts, dict.fromkeys(block.W, make_grid(grid, 2, 8)), block, 16, TuneOptions(20))
        assert found.step > 0
        assert any(not torch.equal(found.layers[name].scale, starts[name].scale) for name in starts) == moved


def test_start_is_kept_where_no_step_is_better():
    block = TwoLayers()
    starts = solved(block)
    found = tune(
        block.W,
        starts,
        dict.fromkeys(block.W, make_grid("int", 2, 8)),
        block,
        16,
        TuneOptions(5, code_travel=50.0, adapter_rate=5.0),
    )
    assert found.step == 0
    assert found.error == found.error_before
    assert all(torch.equal(found.layers[name].codes, starts[name].codes) for name in starts)


def test_same_seed_gives_the_same_bits_and_another_another_order():
    results = []
    for seed in (3, 3, 4):
        block = TwoLayers()
        found = tune(
            block.W,
            solved(block),
            dict.fromkeys(block.W, make_grid("int", 2, 8)),
            block,
            16,
            TuneOptions(7, batch=5, seed=seed),
        )
        results.append((block.seen, [tensor for layer in found.layers.values() for tensor in (layer.codes, layer.L)]))
    first, again, other = results
    assert first[0] == again[0] != other[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    drawn = [sequence for batch in first[0] for sequence in batch]
    assert sorted(drawn[:14]) == list(range(14))  # every sequence once before any comes again


@pytest.mark.parametrize("grid", ["int", "int-asym", "mxint", "nf4"])
def test_one_step_is_that_of_plain_float64(grid):
    kind = make_grid(grid, 4, 32) if grid == "nf4" else make_grid(grid, 3, 8)
    options, size = TuneOptions(10, code_travel=0.4, scale_travel=0.1, adapter_rate=0.01), kind.group_size
    generator = torch.Generator().manual_seed(2)
    W, gradient = torch.randn(M, N, generator=generator), torch.randn(M, N, generator=generator)
    L, R = torch.randn(M, 3, generator=generator).bfloat16(), torch.randn(3, N, generator=generator).bfloat16()
    codes, scale = kind.quantize(W)
    layer = TunedLayer(W, Stored(codes, scale, L, R), kind, options)
    layer.step(gradient, 0.5)

    # Adam's first step is its rate in the direction of the sign.
    G, s = gradient.double(), scale.double()
    target = (W.double() - L.double() @ R.double()).reshape(M, -1, size) / s[..., None]
    wanted, q = kind.position(target.float()).double(), codes.double().reshape(M, -1, size)
    latent = q + LEANING * (wanted - q).clamp(-0.5, 0.5) - 2 * 0.4 / 10 * 0.5 * G.reshape(M, -1, size).sign()
    if kind.continuous:
        s = s * torch.exp(-2 * 0.1 / 10 * 0.5 * (G.reshape(M, -1, size) * kind.points(q)).sum(-1).sign())
    L1 = L.double() - 0.5 * 0.01 * L.double().square().mean().sqrt() * (G @ R.double().mT).sign()
    R1 = R.double() - 0.5 * 0.01 * R.double().square().mean().sqrt() * (L.double().mT @ G).sign()
    low, high = code_range(kind, codes)
    reached = latent.clamp(low - 0.5, high + 0.5).round().clamp(low, high)
    expected = (kind.points(reached) * s[..., None]).reshape(M, N) + L1 @ R1
    close = (layer.weight().double() - expected).abs() < 1e-4
    assert close.double().mean() > 0.999  # a latent value that lies half way may be rounded either way
    assert torch.equal(layer.stored().L, L1.float().bfloat16())


def test_remeasured_solution_is_what_is_stored():
    block = TwoLayers()
    starts, kind = solved(block), make_grid("int", 2, 8)
    found = tune(block.W, starts, dict.fromkeys(block.W, kind), block, 16, TuneOptions(20))
    for name, W in block.W.items():
        metric = Metric(torch.rand(W.shape[1], generator=torch.Generator().manual_seed(0)) + 0.5, unit=3.0)
        layer = remeasured(W, metric, starts[name], found.layers[name], kind)
        delta = (W - layer.weight(kind)).double()
        assert layer.result["objective"]["stored"] == pytest.approx(
            3.0 * float((delta.square() * metric.H).sum()), rel=1e-4
        )
        product = layer.L.double() @ layer.R.double()
        wanted = found.layers[name].L.double() @ found.layers[name].R.double()
        assert float((product - wanted).norm() / wanted.norm()) < 0.01  # bfloat16, sorted anew
        sigma = torch.linalg.svdvals(product * (3.0 * metric.H.double()).sqrt())[:2]
        assert torch.allclose(layer.singular_values.double(), sigma, rtol=0.02)
        assert layer.result["singular_values"] == sorted(layer.result["singular_values"], reverse=True)
        assert torch.equal(layer.codes, found.layers[name].codes)
