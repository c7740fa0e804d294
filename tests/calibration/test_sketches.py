"""Sketches against sums of whole gradients in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from srr_dist.calibration import sketches
from srr_dist.calibration.sketches import (
    HeldOut,
    Sketch,
    gradient_is_cheaper,
    held_out_bytes,
    output_bands,
    sketch_bytes,
    sketch_operations,
    sketch_passes,
    sketch_waiting_bytes,
)
from tests.solve.problems import second_order, with_threads

KINDS = ("B", "A:1", "A:3", "full", "diag", "scalar")
TALL, WIDE = (90, 12, 20), (5, 24, 40)
"""T, m and n: many tokens, of which G is formed, and few, of which it is not."""

Pair = tuple[Tensor, Tensor]


def pairs(shape: tuple[int, int, int], count: int = 6, dtype: torch.dtype = torch.float32) -> list[Pair]:
    """Inputs and gradients of sequences, correlated, with columns of very different size."""
    tokens, m, n = shape
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        x = torch.randn(tokens, n, generator=generator) * torch.logspace(0, -1, n)
        g = torch.randn(tokens, m, generator=generator) * torch.logspace(-3, -5, m) * (1.0 + x[:, :1].abs())
        found.append((x.to(dtype), g.to(dtype)))
    return found


def summed(kind: str, data: list[Pair], band: int = 0) -> Sketch:
    sketch = Sketch(kind, data[0][1].shape[1], data[0][0].shape[1], band=band)
    for _ in range(sketch_passes(kind)):
        for x, g in data:
            sketch.update(x, g)
        sketch.turn()
    return sketch


def blocks(H: Tensor, bands: int) -> Tensor:
    """Those of a matrix along its diagonal: ``[bands, b, b]``."""
    width = len(H) // bands
    return torch.stack([H[start : start + width, start : start + width] for start in range(0, len(H), width)])


def by_definition(kind: str, data: list[Pair], bands: int = 1) -> dict[str, Tensor]:
    data = [(x.double(), g.double()) for x, g in data]
    x, g = torch.cat([x for x, _ in data]), torch.cat([g for _, g in data])
    full = g.mT @ g / len(g)
    match kind:
        case "B":
            gradients = torch.stack([g.mT @ x for x, g in data])
            m, n = gradients.shape[1:]
            products = {"output": gradients @ gradients.mT / n, "input": gradients.mT @ gradients / m}
            return {side: product.mean(0) for side, product in products.items()} | {"tokens": full}
        case "full":
            return {"output": full}
        case "diag":
            return {"output": full.diagonal()}
        case "scalar":
            return {"output": full.diagonal().mean(0, keepdim=True)}
    H_I = x.mT @ x / len(x)
    for _ in range(int(kind[2:])):
        H_O = torch.einsum("ti,ij,tj,tp,tq->pq", x, H_I, x, g, g) / len(x) / H_I.square().sum()
        H_O = torch.block_diag(*blocks(H_O, bands))
        H_I = torch.einsum("tp,pq,tq,ti,tj->ij", g, H_O, g, x, x) / len(x) / H_O.square().sum()
    return {"output": H_O, "input": H_I}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [TALL, WIDE, (1, 1, 1), (3, 1, 7)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_factors_are_those_of_float64(kind, shape, dtype):
    data = pairs(shape, dtype=dtype)
    found, expected = summed(kind, data).value(), by_definition(kind, data)
    assert found.keys() == expected.keys()
    for side, factor in found.items():
        error = (factor - expected[side]).norm() / expected[side].norm()
        assert float(error) < 3e-6, side


@pytest.mark.parametrize(("shape", "band"), [(TALL, 5), (WIDE, 8)], ids=str)
@pytest.mark.parametrize("kind", ["B", "A:1", "A:2", "full"])
def test_output_side_of_a_tall_layer_is_the_blocks_along_its_diagonal(kind, shape, band):
    data = pairs(shape)
    found, expected = summed(kind, data, band).value(), by_definition(kind, data, bands=3)
    bands = {side: blocks(H, 1 if side == "input" else 3).squeeze(0) for side, H in expected.items()}
    assert {side: factor.shape for side, factor in found.items()} == {side: H.shape for side, H in bands.items()}
    for side, factor in found.items():
        assert float((factor - bands[side]).norm() / bands[side].norm()) < 3e-6, side


@given(st.integers(1, 300), st.integers(0, 300))
def test_bands_are_as_few_equal_ones_as_are_narrow_enough(m, most):
    bands = output_bands(m, most)
    enough = [count for count in range(1, m + 1) if m % count == 0 and (most == 0 or m // count <= most)]
    assert bands == min(enough)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "band"), [((512, 96, 160), 0), ((64, 192, 320), 0), ((64, 192, 320), 64)], ids=str)
def test_factors_are_bitwise_the_same_for_any_threads(kind, shape, band):
    data = pairs(shape, count=2)
    first, second = (with_threads(n, lambda: summed(kind, data, band).value()) for n in (1, 2))
    assert all(torch.equal(first[side], second[side]) for side in first)


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
def test_factors_do_not_depend_on_whether_the_gradient_is_formed(monkeypatch, shape):
    values = []
    for formed in (True, False):
        monkeypatch.setattr(sketches, "gradient_is_cheaper", lambda *_, formed=formed: formed)
        values.append(summed("B", pairs(shape)))
    formed, through_tokens = values
    for side in ("output", "input"):
        torch.testing.assert_close(formed.value()[side], through_tokens.value()[side], rtol=1e-4, atol=1e-12)
        assert formed.sides[side].tokens == through_tokens.sides[side].tokens


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(TALL, True), (WIDE, False), ((1024, 576, 1536), True), ((2048, 8192, 28672), False), ((2048, 1024, 8192), True)],
    ids=str,
)
def test_gradient_is_formed_where_that_takes_fewer_operations(shape, expected):
    assert gradient_is_cheaper(*shape) is expected


def test_narrow_bands_take_fewer_operations():
    for kind in ("B", "A:1", "full"):
        wide, narrow = (sketch_operations(kind, 128, 1536, 576, band) for band in (0, 512))
        assert narrow < 0.8 * wide


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_shards_add_up(kind):
    data = pairs(TALL)
    whole, first, second = (Sketch(kind, 12, 20) for _ in range(3))
    for index, pair in enumerate(data):
        whole.update(*pair)
        (first if index < 2 else second).update(*pair)
    first.merge(second)
    for side, factor in first.value().items():
        expected = whole.value()[side]
        torch.testing.assert_close(factor, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spoiled", [0, 1], ids=["input", "gradient"])
def test_sequence_that_is_not_finite_is_left_out_whole_and_counted(kind, spoiled):
    data = pairs(TALL, count=4)
    bad = [tensor.clone() for tensor in data[1]]
    bad[spoiled][7, 3] = torch.nan
    found, expected = summed(kind, [data[0], tuple(bad), *data[2:]]), summed(kind, [data[0], *data[2:]])
    for side, factor in expected.value().items():
        assert torch.equal(found.value()[side], factor)
        assert found.sides[side].excluded == TALL[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "band"), [(12, 0), (12, 6), (48, 24), (48, 12)])
def test_sketch_bytes_is_the_size_of_the_sums_and_of_a_weight(kind, m, band):
    sketch = Sketch(kind, m, 20, band=band)
    sums = sum(side.total.nbytes for side in sketch.sides.values())
    ((x, g),), weight = pairs((90, m, 20), count=1), 0
    for _ in range(sketch_passes(kind)):
        sketch.update(x, g)
        sketch.turn()
        weight = max(weight, sketch._weight.nbytes if sketch._weight is not None else 0)
    assert sketch_bytes(kind, m, 20, band) == sums + weight
    assert bool(weight) == kind.startswith("A:")


@pytest.mark.parametrize("shape", [TALL, WIDE, (600, 12, 20), (600, 530, 520)], ids=str)
@pytest.mark.parametrize("kind", ["B", "A:1", "full"])
def test_rows_that_wait_take_no_more_than_is_planned(kind, shape):
    (tokens, m, n), most = shape, 0
    sketch = Sketch(kind, m, n)
    for x, g in pairs(shape, count=3):
        sketch.update(x, g)
        waiting = [pair for side in sketch.sides.values() for pair in side._waiting]
        most = max(most, sum(part.nbytes for pair in waiting for part in pair))
    planned = sketch_waiting_bytes(kind, tokens, m, n)
    assert most <= planned
    assert bool(most) == bool(planned)


def distance(kind: str, data: list[Pair]) -> float:
    """Of the best multiple of ``H_O ⊗ H_I`` from the second moment of tokens' gradients, as a share of it."""
    x, g = (torch.cat([pair[i] for pair in data]).double() for i in (0, 1))
    tokens = torch.einsum("tp,ti->tpi", g, x).flatten(1)
    F = tokens.mT @ tokens / len(tokens)
    factors = summed(kind, data).value()
    product = torch.kron(factors["output"], factors["input"])
    share = (F * product).sum() / product.norm() / F.norm()
    return float((1.0 - share.square()).clamp_min(0.0).sqrt())


def test_rounds_bring_sketch_a_to_the_nearest_kronecker_product():
    data = pairs((40, 5, 7))
    distances = [distance(kind, data) for kind in ("A:1", "A:2", "A:6", "A:7")]
    assert all(after < before + 1e-9 for before, after in pairwise(distances))
    assert distances[0] > distances[-1] + 1e-5
    assert distances[-2] - distances[-1] < 1e-4


def test_sketch_b_of_independent_factors_finds_both():
    """``G = A Z B`` with Z white has ``E[vec(G) vec(G)ᵀ] = A Aᵀ ⊗ Bᵀ B``."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(6, 6, generator=generator), torch.randn(9, 9, generator=generator)
    sketch = Sketch("B", 6, 9)
    for _ in range(4000):
        sketch.update(torch.randn(6, 9, generator=generator) @ B, A.mT)
    for side, expected in (("output", A @ A.mT), ("input", B.mT @ B)):
        found = sketch.value()[side].float()
        assert float((found / found.norm() - expected / expected.norm()).norm()) < 0.05


def held_out(data: list[Pair]) -> HeldOut:
    held = HeldOut()
    for x, g in data:
        held.keep(x, g)
    return held


@pytest.mark.parametrize(("shape", "names"), [(TALL, ["G"]), (WIDE, ["X", "g"])], ids=str)
def test_held_out_gradients_measure_an_error_as_float64_does(shape, names):
    data, error = pairs(shape), torch.randn(shape[1], shape[2], generator=torch.Generator().manual_seed(1))
    held = held_out(data)
    expected = sum(float((error * (g.mT @ x)).sum().double() ** 2) for x, g in data) / len(data)
    assert second_order(error, held) == pytest.approx(expected, rel=0.03)
    assert second_order(torch.zeros_like(error), held) == 0.0
    assert list(held.tensors()) == names
    assert sum(tensor.nbytes for tensor in held.tensors().values()) == len(data) * held_out_bytes(*shape)


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
def test_held_out_gradients_come_back_from_their_tensors(shape):
    held, error = held_out(pairs(shape)), torch.ones(shape[1], shape[2])
    again = HeldOut.of(held.tensors())
    assert len(again.kept) == 6
    assert second_order(error, again) == second_order(error, held)


@pytest.mark.parametrize("shape", [TALL, WIDE], ids=str)
def test_held_out_gradients_are_copies_and_those_that_are_not_finite_do_not_count(shape):
    (x, g), *_ = pairs(shape, dtype=torch.bfloat16)
    held, error = held_out([(x, g)]), torch.ones(shape[1], shape[2])
    before = second_order(error, held)
    g[0, 0] = torch.inf
    assert second_order(error, held) == before
    held.keep(x, g)
    assert second_order(error, held) == before
    assert math.isnan(second_order(error, held_out([(x, g)])))
