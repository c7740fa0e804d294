"""Bits are bought where they take most off: within the budget, evenly among equals, and as well as by trying all."""

import itertools
import math
import random

import pytest
import torch

from srr_dist.errors import ConfigError
from srr_dist.solve import Metric, Quantizer, allocate, make_grid, width_errors
from tests.solve.problems import moment, normal, second_order, weight, with_threads

WIDTHS = (2, 3, 4, 5)


def curves(seed, count=6):
    """Curves that fall by about four with each bit, some of them not everywhere, of layers of several sizes."""
    draw = random.Random(seed)
    sizes = {f"layer.{i}": draw.choice([1, 2, 6]) * 64 for i in range(count)}
    errors = {}
    for name in sizes:
        scale = 10 ** draw.uniform(-3, 1)
        errors[name] = {width: scale * 4.0**-width * draw.uniform(0.3, 3.0) for width in WIDTHS}
    return errors, sizes


def total(errors, chosen):
    return sum(errors[name][width] for name, width in chosen.items())


def spent(sizes, chosen):
    return sum(sizes[name] * width for name, width in chosen.items())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mean_bits", [2.0, 2.3, 3.0, 3.5, 4.9, 7.0])
def test_budget_is_never_exceeded_and_what_it_buys_is_the_best_for_what_was_spent(seed, mean_bits):
    errors, sizes = curves(seed)
    chosen = allocate(errors, sizes, mean_bits)
    assert spent(sizes, chosen) <= mean_bits * sum(sizes.values())
    choices = (dict(zip(errors, widths, strict=True)) for widths in itertools.product(WIDTHS, repeat=len(errors)))
    least = min(total(errors, other) for other in choices if spent(sizes, other) <= spent(sizes, chosen))
    assert total(errors, chosen) == pytest.approx(least)


@pytest.mark.parametrize("seed", range(8))
def test_no_layer_loses_bits_when_the_budget_grows(seed):
    errors, sizes = curves(seed, count=40)
    found = [allocate(errors, sizes, 2 + step / 10) for step in range(31)]
    for smaller, larger in itertools.pairwise(found):
        assert all(smaller[name] <= larger[name] for name in errors)
    assert found[0] == dict.fromkeys(errors, 2)
    assert sum(spent(sizes, chosen) > 3 * sum(sizes.values()) for chosen in found) > 5


def test_equal_layers_get_equal_bits():
    curve = {width: 4.0**-width for width in WIDTHS}
    errors, sizes = dict.fromkeys("abcd", curve), dict.fromkeys("abcd", 64)
    assert [allocate(errors, sizes, bits) for bits in (2, 3, 4)] == [dict.fromkeys("abcd", bits) for bits in (2, 3, 4)]
    assert allocate(errors, sizes, 3.5) == {"a": 4, "b": 4, "c": 3, "d": 3}


def test_order_and_scale_of_the_curves_do_not_matter():
    errors, sizes = curves(3)
    turned = {
        name: {width: 1e-9 * curve[width] for width in reversed(WIDTHS)} for name, curve in [*errors.items()][::-1]
    }
    assert allocate(turned, sizes, 3.3) == allocate(errors, sizes, 3.3)


def test_layers_that_follow_a_leader_are_weighed_together_and_have_one_width():
    errors, sizes = curves(6)
    leaders = {name: "layer.0" if name in ("layer.0", "layer.3") else name for name in errors}
    chosen = allocate(errors, sizes, 3.4, leaders)
    both = {width: errors["layer.0"][width] + errors["layer.3"][width] for width in WIDTHS}
    merged = {name: curve for name, curve in errors.items() if name != "layer.3"} | {"layer.0": both}
    expected = allocate(merged, sizes | {"layer.0": sizes["layer.0"] + sizes["layer.3"]}, 3.4)
    assert chosen == expected | {"layer.3": expected["layer.0"]}
    assert list(chosen) == list(errors)
    assert allocate(errors, sizes, 3.4)["layer.0"] != allocate(errors, sizes, 3.4)["layer.3"]


def nearest(W, grid, scales, h):
    """In float64: of the grid's scales for each group the first, or the one under which least is lost."""
    groups, (low, high), tried = W.double().reshape(len(W), -1, grid.group_size), grid.code_range, []
    for scale, _ in itertools.islice(grid.candidates(W), 1 if scales == "absmax" else None):
        step = scale.double()[..., None]
        tried.append(((groups / step).round().clamp(low, high) * step).bfloat16().double())
    found = torch.stack(tried)
    least = ((groups - found).square() * h.reshape(1, -1, grid.group_size)).sum(-1).argmin(0)
    return found.gather(0, least[None, ..., None].expand(1, *groups.shape))[0].reshape(W.shape)


@pytest.mark.parametrize("scales", ["absmax", "search"])
@pytest.mark.parametrize("kind", ["int", "mxint"])
def test_errors_of_widths_are_those_of_nearest_codes_weighed_by_squared_gradients(kind, scales):
    columns = torch.logspace(0, 2, 64, dtype=torch.float64)
    W, gradients = weight(48, 64), [(normal(48, 64, seed=seed) * columns).float() for seed in range(6)]
    grids = {bits: make_grid(kind, bits, 16) for bits in (2, 3, 5, 8)}
    found = width_errors(W, grids, scales, iter([*gradients, torch.full((48, 64), torch.nan)]))
    squares = sum(G.double().square() for G in gradients) / 6
    for bits, grid in grids.items():
        delta = W.double() - nearest(W, grid, scales, squares.sum(0))
        assert found[bits] == pytest.approx(float((delta.square() * squares).sum()), rel=1e-4)
    assert sorted(found, key=found.__getitem__) == [8, 5, 3, 2]


def test_errors_of_widths_are_near_what_they_do_along_drawn_gradients():
    """Of nearest codes, whose errors are as good as independent, ``E ⟨Δ, G⟩²`` is the weighed sum of squares."""
    W, grid = weight(96, 128), make_grid("int", 4, 16)
    left, right = (torch.linalg.cholesky(moment("decaying", size)) for size in (96, 128))
    gradients = [(left @ normal(96, 128, seed=seed) @ right.mT).float() for seed in range(200)]
    delta = W - grid.dequantize(*Quantizer(grid).quantize(W, Metric(torch.ones(128))))
    found = width_errors(W, {4: grid}, "absmax", gradients)[4]
    assert found == pytest.approx(second_order(delta, gradients), rel=0.3)


def test_errors_of_widths_are_none_where_no_gradient_reaches_a_layer_and_unknown_without_any():
    W, grids = weight(48, 64), {bits: make_grid("int", bits, 16) for bits in WIDTHS}
    assert width_errors(W, grids, "search", [torch.zeros(48, 64)] * 2) == dict.fromkeys(WIDTHS, 0.0)
    assert all(math.isnan(error) for error in width_errors(W, grids, "search", []).values())


def test_errors_of_widths_do_not_depend_on_threads():
    W, gradients = weight(160, 64), [normal(160, 64, seed=seed).float() for seed in range(4)]
    grids = {bits: make_grid("int", bits, 16) for bits in WIDTHS}
    first = with_threads(1, lambda: width_errors(W, grids, "search", gradients))
    assert first == with_threads(3, lambda: width_errors(W, grids, "search", gradients))


def test_bits_that_take_nothing_off_are_not_bought():
    errors = {"a": {2: 1.0, 3: 1.0, 4: 2.0}, "b": {2: 1.0, 3: 0.9, 4: 0.1}}
    assert allocate(errors, {"a": 1, "b": 1}, 4) == {"a": 2, "b": 4}


def test_budget_below_the_least_width_is_refused():
    with pytest.raises(ConfigError, match=r"mean bits: expected 2 or more, the least width, found 1\.5"):
        allocate({"a": {2: 1.0, 3: 0.5}}, {"a": 64}, 1.5)
