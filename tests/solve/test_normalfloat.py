"""The NF4 table against the quantiles it is made of, positions against plain float64, and the grid over both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srr_dist.config import NF4_BLOCKS
from srr_dist.errors import ConfigError
from srr_dist.solve import IntGrid, Metric, NF4Grid, Quantizer, make_grid
from srr_dist.solve.normalfloat import VALUES, position, values
from srr_dist.solve.scales import search_scales
from tests.solve.problems import moment, objective, weight, with_threads

TABLE = torch.tensor(VALUES, dtype=torch.float64)


def position_by_definition(number):
    """Linear between the two values around a number, in float64."""
    number = min(max(number, -1.0), 1.0)
    low = max(code for code in range(15) if VALUES[code] <= number)
    return low + (number - VALUES[low]) / (VALUES[low + 1] - VALUES[low])


def test_table_is_quantiles_of_the_normal_distribution():
    # QLoRA: evenly spaced quantiles of either half, whose outermost lies half way between 1 − 1/30 and 1 − 1/32.
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    normal = torch.distributions.Normal(*torch.tensor([0.0, 1.0], dtype=torch.float64))
    upper = normal.icdf(torch.linspace(outermost, 0.5, 9, dtype=torch.float64)).flip(0)
    lower = -normal.icdf(torch.linspace(outermost, 0.5, 8, dtype=torch.float64))
    expected = torch.cat((lower[:-1], upper)) / upper[-1]
    torch.testing.assert_close(TABLE, expected, rtol=0, atol=1e-6)


def test_values_are_the_table_and_their_positions_the_codes():
    codes = torch.arange(16, dtype=torch.int8).view(2, 8)
    assert torch.equal(values(codes), torch.tensor(VALUES).view(2, 8))
    torch.testing.assert_close(position(values(codes)), codes.float(), rtol=0, atol=1e-6)
    assert position(torch.tensor([0.0, -0.0])).tolist() == [7.0, 7.0]


def test_position_is_linear_between_values_and_ends_with_the_table():
    numbers = torch.cat((torch.linspace(-1.5, 1.5, 3001), torch.tensor([torch.inf, -torch.inf, 1e30, 1e-30])))
    expected = torch.tensor([position_by_definition(number) for number in numbers.tolist()])
    torch.testing.assert_close(position(numbers), expected, rtol=0, atol=2e-6)
    assert (position(numbers[:3001]).diff() >= 0).all()


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from(NF4_BLOCKS[:3]),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-60, 60),
)
def test_quantize_takes_the_nearest_value(size, seed, exponent):
    grid, W = NF4Grid(4, size), weight(3, 256, seed=seed) * 2.0**exponent
    codes, scale = grid.quantize(W)
    assert codes.dtype == torch.int8 and codes.shape == W.shape and scale.dtype == torch.bfloat16
    assert torch.equal(scale, W.reshape(3, -1, size).abs().amax(-1).bfloat16())
    steps = scale.double().repeat_interleave(size, dim=1)
    nearest = (W.double()[..., None] - TABLE * steps[..., None]).abs().amin(-1)
    torch.testing.assert_close(
        (W.double() - TABLE[codes.long()] * steps).abs(), nearest, rtol=1e-5, atol=1e-6 * 2.0**exponent
    )


def test_dequantize_is_the_float32_product_in_bfloat16():
    grid = NF4Grid(4, 32)
    codes, scale = grid.quantize(weight(4, 64))
    product = torch.tensor(VALUES)[codes.long()] * scale.float().repeat_interleave(32, dim=1)
    assert torch.equal(grid.dequantize(codes, scale), product.bfloat16().float())


def test_zero_group_gives_zeros_under_every_scale_that_is_tried():
    grid, W = NF4Grid(4, 32), torch.zeros(1, 32)
    for scale, zero in grid.candidates(W):
        assert scale.float().abs().item() >= 2.0**-126 and zero is None
        assert not grid.dequantize(grid.encode(W, scale), scale).any()


def test_zero_among_others_stays_zero():
    W = weight(4, 64)
    W[:, ::3] = 0.0
    grid = NF4Grid(4, 64)
    assert not grid.dequantize(*grid.quantize(W))[:, ::3].any()


def test_normal_weights_lose_less_than_under_integers_of_as_many_bits():
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [(W - grid.dequantize(*grid.quantize(W))).square().sum() for grid in (NF4Grid(4, 64), IntGrid(4, 64))]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_search_turns_the_table_where_the_weights_fit_the_other_way_round(side):
    codes = torch.arange(32).remainder(16).view(1, 32)
    W = side * 0.5 * torch.tensor(VALUES)[codes]
    scale, _ = search_scales(W, NF4Grid(4, 32), torch.ones(32))
    assert scale.item() == side * 0.5


def test_searched_and_fed_back_codes_are_the_same_for_any_threads_and_lose_less():
    W, metric, grid = weight(96, 128), Metric.of(moment("decaying", 128)), NF4Grid(4, 32)
    errors = []
    for scales, rounding in (("absmax", "nearest"), ("search", "nearest"), ("search", "gptq")):
        quantizer = Quantizer(grid, scales, rounding)
        first, second = (with_threads(threads, lambda: quantizer.quantize(W, metric)) for threads in (1, 2))  # noqa: B023
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        errors.append(objective(W - grid.dequantize(*first), metric.H.double()))
    assert errors[2] < 0.8 * errors[1] and errors[1] < 0.95 * errors[0]


def test_bits_per_weight_counts_float32_scales():
    assert make_grid("nf4", 4, 64).bits_per_weight(576) == 4.5
    assert make_grid("nf4", 4, 32).bits_per_weight(576) == 5.0


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        (3, 64, "bits: nf4 has 4, found 3"),
        (4, -1, r"group_size: nf4 has blocks of 32, 64.*, found -1"),
        (4, 48, r"group_size: nf4 has blocks of 32, 64.*, found 48"),
    ],
)
def test_other_widths_and_blocks_are_refused(bits, group_size, message):
    with pytest.raises(ConfigError, match=message):
        make_grid("nf4", bits, group_size)
