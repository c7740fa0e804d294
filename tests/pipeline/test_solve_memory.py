"""What solving takes by arithmetic, beside the tensors that are alive while a layer is solved."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srr_dist.calibration import InputMoment
from srr_dist.calibration.sketches import HeldOut, Sketch
from srr_dist.checkpoint.graph import Linear
from srr_dist.pipeline import two_sided
from srr_dist.pipeline.collecting import SketchedLayer
from srr_dist.pipeline.solve_memory import Solving, solve_bytes, solve_bytes_beside
from srr_dist.solve import Metric, Quantizer, SolveOptions, make_grid, solve_layer

MIB = 2**20
NEAREST = SolveOptions("srr", Quantizer(make_grid("mxint", 3, 32)), 4, split="criterion")
FEEDBACK = replace(NEAREST, quantizer=Quantizer(make_grid("int", 3, 64), "search", "gptq"))
DESCENT = replace(NEAREST, iterations=1, descent=2)
WHOLE = replace(FEEDBACK, iterations=2, descent=2, rounding_metric="downdated")


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations made and that are still there, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._sizes:
                self._enter(tensor.untyped_storage())
        return found

    def _enter(self, storage: torch.UntypedStorage) -> None:
        self._sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._leave, storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)

    def _leave(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def layers(*shapes: tuple[int, int]) -> list[list[Linear]]:
    """Layers of ``(outputs, inputs)``, each with an input of its own."""
    return [[Linear(str(number), m, n, str(number))] for number, (m, n) in enumerate(shapes)]


def of(options: SolveOptions) -> Solving:
    return Solving(
        feedback=options.quantizer.rounding == "gptq",
        descent=options.descent > 0,
        downdated=options.rounding_metric == "downdated",
    )


@pytest.mark.parametrize("shape", [(256, 768), (768, 256)], ids=["wide", "tall"])
@pytest.mark.parametrize("options", [FEEDBACK, DESCENT, WHOLE], ids=["feedback", "descent", "whole"])
def test_bytes_are_those_of_the_tensors_that_are_alive(options, shape):
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(m, n, generator=generator), torch.randn(2 * n, n, generator=generator)
    metric = Metric.of(x.mT @ x, 0.1)
    with Alive() as alive:
        solve_layer(W.clone(), Metric(metric.H.clone(), metric.unit), "layer", options)
    planned = solve_bytes(layers(shape), of(options), "exact", 1, on_gpu=False)
    assert 0.85 * planned < alive.most < 1.15 * planned


def test_moment_taken_from_its_sums_is_not_held_twice():
    n = 512
    with Alive() as alive:
        moment = InputMoment(n, "exact")
        moment.update(torch.randn(n, n))
        summed, alive.most = alive.now, alive.now
        metric = Metric.of(moment.take())
        assert alive.now - 4 * n * n < 0.1 * summed  # the sums are gone
    assert metric.H.shape == (n, n)
    assert alive.most - alive.now < 8.5 * n * n + MIB


def test_factoring_the_moment_is_what_a_wide_layer_needs_most_for():
    n = 4096
    plain, fed, beyond = (
        solve_bytes(layers((64, n)), solving, "exact", 1, on_gpu=False)
        for solving in (Solving(), Solving(feedback=True), Solving(feedback=True, downdated=True))
    )
    assert fed - plain == 12 * n * n - 4 * 64 * n  # of weights, there is one matrix less
    assert beyond - fed == 8 * n * n  # a factor, and the downdated moment
    diagonal = (Solving(), Solving(feedback=True, descent=True, downdated=True))
    assert len({solve_bytes(layers((64, n)), solving, "diag", 1, on_gpu=False) for solving in diagonal}) == 1


@pytest.mark.parametrize(("shape", "band"), [((512, 512), 0), ((256, 768), 0), ((768, 256), 0), ((1152, 384), 384)])
@pytest.mark.parametrize("rank", [0, 8])
def test_bytes_of_a_gated_solution_are_those_of_the_tensors_that_are_alive(shape, band, rank, monkeypatch):
    (m, n), generator = shape, torch.Generator().manual_seed(0)
    options = replace(WHOLE, quantizer=Quantizer(make_grid("int", 3, 64), "search", "yaqa"))
    options = replace(options, rank=rank) if rank else replace(options, method="none")
    x, g = (torch.randn(64, width, generator=generator) for width in (n, m))
    W, H = torch.randn(m, n, generator=generator), x.mT @ x

    def recall(*_: Any) -> SketchedLayer:
        layer = SketchedLayer(Sketch("B", m, n, band=band), HeldOut([(x, g)] * 3))
        layer.sketch.update(x, g)
        return layer

    monkeypatch.setattr(two_sided, "recall", recall)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(shrinkage=0.1), grid_of=lambda _: options.quantizer.grid, solve_options=lambda _: options
    )
    linear = Linear("layer", m, n, "layer")
    solving = Solving(feedback=True, descent=True, downdated=rank > 0, gated=True, band=band)
    with Alive() as alive:
        two_sided.solve_gated(run, linear, W.clone(), Metric.of(H, 0.1))
    planned = solve_bytes(layers(shape), solving, "exact", 1, on_gpu=False)
    assert 0.85 * planned < alive.most < 1.15 * planned


def test_bands_keep_the_output_side_of_a_tall_layer_small():
    m, n = 53248, 16384
    whole, banded = (
        solve_bytes(layers((m, n)), Solving(feedback=True, gated=True, band=band), "exact", 1, on_gpu=True)
        for band in (0, 8192)
    )
    assert whole > 2 * banded
    assert whole - banded > 8 * (m * m - m * m // 8)


def test_moments_that_lie_beside_go_as_they_are_solved():
    small, large = (8, 1024), (8, 4096)
    first, last = (
        solve_bytes_beside(layers(*order), Solving(), "exact", 1) for order in ((large, small), (small, large))
    )
    assert last == 12 * 4096**2  # sums and what is made of them; those of the other layer are gone
    assert first == last + 8 * 1024**2
    tuned = solve_bytes_beside(layers(small, large), Solving(tuned=True), "exact", 1)
    assert tuned == 8 * 1024**2 + (8 + 12) * 4096**2


def test_gpu_takes_a_moment_from_elsewhere_in_float64():
    wide = layers((8, 4096))
    here, there = (solve_bytes(wide, Solving(), "exact", 1, on_gpu=on_gpu) for on_gpu in (False, True))
    assert there == 12 * 4096**2 > here
