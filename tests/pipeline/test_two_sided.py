"""Which of a layer's two solutions is kept, and that held-out gradients alone decide."""

from __future__ import annotations

import math
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from srr_dist.calibration.sketches import HeldOut, Sketch
from srr_dist.checkpoint.graph import Linear
from srr_dist.errors import StoreError
from srr_dist.pipeline import two_sided as module
from srr_dist.pipeline.collecting import SketchedLayer
from srr_dist.pipeline.two_sided import solve_gated
from srr_dist.solve import (
    ONE_SIDED,
    TWO_SIDED,
    IntGrid,
    Metric,
    Quantizer,
    SolveOptions,
    sketch_metric,
    solve_layer,
)
from tests.solve.problems import moment, normal, second_order, weight

M, N, LINEAR = 48, 64, Linear("layer", 48, 64, "layer")
GRID = IntGrid(2, 16)
OPTIONS = SolveOptions("srr", Quantizer(GRID, "search", "yaqa"), 4, "criterion", iterations=1)
RUN: Any = SimpleNamespace(
    config=SimpleNamespace(shrinkage=0.0), grid_of=lambda _: GRID, solve_options=lambda _: OPTIONS
)


def gradients(count: int, outputs: int, first: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Inputs and output gradients of sequences, one token each, whose moments are those of two problems."""
    C_O, C_I = (torch.linalg.cholesky(moment("decaying", size, seed=seed)) for size, seed in ((M, outputs), (N, 0)))
    seeds = range(first, first + count)
    pairs = [(normal(8, N, seed=2 * s) @ C_I.mT, normal(8, M, seed=2 * s + 1) @ C_O.mT) for s in seeds]
    return [(x.float(), g.float()) for x, g in pairs]


def sketched(
    seen: list[tuple[Tensor, Tensor]], unseen: list[tuple[Tensor, Tensor]], kind: str = "B", band: int = 0
) -> SketchedLayer:
    kept = SketchedLayer(Sketch(kind, M, N, band=band), HeldOut())
    for x, g in seen:
        kept.sketch.update(x, g)
    for x, g in unseen:
        kept.held_out.keep(x, g)
    return kept


def gated(monkeypatch, kept: SketchedLayer | None):
    monkeypatch.setattr(module, "recall", lambda run, linear: deepcopy(kept))  # whose sums are taken
    return solve_gated(RUN, LINEAR, weight(M, N), Metric.of(moment("decaying", N)))


def test_two_sided_solution_is_kept_where_held_out_gradients_are_as_those_seen(monkeypatch):
    kept = sketched(gradients(400, outputs=3), gradients(200, outputs=3, first=1000))
    found, inputs = gated(monkeypatch, kept), Metric.of(moment("decaying", N))
    gate = found.result["gate"]
    assert gate["chosen"] == TWO_SIDED
    assert 0.5 < gate["cosine"] < 1.5
    for side, metric in ((ONE_SIDED, inputs), (TWO_SIDED, sketch_metric(kept.sketch.value(), inputs, 0.0))):
        alone = solve_layer(weight(M, N), metric, "layer", OPTIONS)
        estimate = second_order(weight(M, N) - alone.weight(GRID), kept.held_out)
        assert gate["second_order"][side] == pytest.approx(estimate, rel=1e-9)
        assert torch.equal(found.codes, alone.codes) == (side == TWO_SIDED)
    assert gate["second_order"][TWO_SIDED] < 0.9 * gate["second_order"][ONE_SIDED]
    assert "damping_output" in found.result


def test_one_sided_solution_is_kept_where_the_sketch_saw_something_else(monkeypatch):
    kept = sketched(gradients(2, outputs=3), gradients(200, outputs=11, first=1000))
    found = gated(monkeypatch, kept)
    assert found.result["gate"]["chosen"] == ONE_SIDED
    assert "damping_output" not in found.result
    one_sided = solve_layer(weight(M, N), Metric.of(moment("decaying", N)), "layer", OPTIONS)
    assert torch.equal(found.codes, one_sided.codes) and torch.equal(found.R, one_sided.R)


def test_gradients_that_are_not_finite_decide_nothing(monkeypatch):
    bad = [(torch.full((8, N), math.inf), torch.ones(8, M))]
    gate = gated(monkeypatch, sketched(gradients(20, outputs=3), bad)).result["gate"]
    nothing = {"second_order": {ONE_SIDED: None, TWO_SIDED: None}, "standard_error": None, "cosine": None}
    assert gate == {"chosen": ONE_SIDED} | nothing


def test_sketch_that_is_lost_names_its_layer(monkeypatch):
    with pytest.raises(StoreError, match="layer layer: what its gradients left is not kept any more"):
        gated(monkeypatch, None)


@pytest.mark.parametrize(("kind", "shape"), [("full", (M, M)), ("diag", (M,)), ("scalar", None)])
def test_sketch_of_outputs_alone_stands_beside_the_metric_of_inputs(kind, shape):
    inputs = Metric.of(moment("decaying", N))
    metric = sketch_metric(sketched(gradients(20, outputs=3), [], kind).sketch.value(), inputs, 0.1)
    assert torch.equal(metric.H, inputs.H)
    assert (metric.outputs.H.shape if metric.outputs is not None else None) == shape


def test_shrinkage_reaches_both_sides_of_a_sketch():
    kept, H = sketched(gradients(20, outputs=3), []), moment("decaying", N)
    plain, shrunk = (sketch_metric(kept.sketch.value(), Metric.of(H, share), share) for share in (0.0, 0.5))
    assert plain.outputs is not None and shrunk.outputs is not None
    torch.testing.assert_close(shrunk.H - plain.H, 0.5 * torch.eye(N))
    torch.testing.assert_close(shrunk.outputs.H - plain.outputs.H, 0.5 * torch.eye(M))


@pytest.mark.parametrize("scaling", ["full", "diagonal"])
def test_sides_of_sketch_b_are_averaged_with_those_of_single_tokens(scaling):
    sides, H = sketched(gradients(20, outputs=3), []).sketch.value(), moment("decaying", N)
    inputs = Metric.of(H.diagonal() if scaling == "diagonal" else H, 0.1)
    metric = sketch_metric(sides, inputs, 0.1)
    assert metric.outputs is not None
    tokens = H.diagonal().diag() if scaling == "diagonal" else H
    for found, side, of_tokens in ((metric, "input", tokens), (metric.outputs, "output", sides["tokens"])):
        own, theirs = (A / A.diagonal().mean() for A in (sides[side], of_tokens))
        expected = 0.25 * own + 0.75 * theirs + 0.1 * torch.eye(len(own), dtype=torch.float64)
        torch.testing.assert_close(found.H.double(), expected, rtol=1e-5, atol=1e-6)
    assert float(inputs.weights.mean()) == pytest.approx(1.1)  # which is left as it was


def test_metric_in_bands_is_that_of_all_outputs_without_what_lies_between_them():
    data, inputs = gradients(20, outputs=3), Metric.of(moment("decaying", N), 0.1)
    whole, banded = (sketch_metric(sketched(data, [], band=band).sketch.value(), inputs, 0.1) for band in (0, 20))
    assert whole.outputs is not None and banded.outputs is not None
    assert banded.unit == pytest.approx(whole.unit) and banded.outputs.H.shape == (3, 16, 16)
    torch.testing.assert_close(banded.H, whole.H)
    for number, band in enumerate(banded.outputs.H):
        own = slice(16 * number, 16 * (number + 1))
        torch.testing.assert_close(band, whole.outputs.H[own, own])


def test_layer_in_bands_is_solved_for_the_network_and_differs_from_one_without(monkeypatch):
    data, held = gradients(40, outputs=3), gradients(24, outputs=3, first=100)
    whole, banded = (gated(monkeypatch, sketched(data, held, band=band)) for band in (0, 16))
    assert banded.result["gate"]["chosen"] == whole.result["gate"]["chosen"] == TWO_SIDED
    assert not torch.equal(whole.codes, banded.codes)


def test_sketch_of_no_gradients_leaves_the_moment_out():
    sides = {
        side: torch.zeros(size, size, dtype=torch.float64)
        for side, size in (("output", M), ("input", N), ("tokens", M))
    }
    metric = sketch_metric(sides, Metric.of(moment("decaying", N)), 0.1)
    assert metric.unit == 0.0 and torch.equal(metric.H, torch.ones(N))
