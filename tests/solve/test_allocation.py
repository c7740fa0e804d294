"""Bits are bought where they take most off: within the budget, evenly among equals, and as well as by trying all."""

import itertools
import random

import pytest

from srr_dist.errors import ConfigError
from srr_dist.solve import allocate

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


def test_bits_that_take_nothing_off_are_not_bought():
    errors = {"a": {2: 1.0, 3: 1.0, 4: 2.0}, "b": {2: 1.0, 3: 0.9, 4: 0.1}}
    assert allocate(errors, {"a": 1, "b": 1}, 4) == {"a": 2, "b": 4}


def test_budget_below_the_least_width_is_refused():
    with pytest.raises(ConfigError, match=r"mean bits: expected 2 or more, the least width, found 1\.5"):
        allocate({"a": {2: 1.0, 3: 0.5}}, {"a": 64}, 1.5)
