"""Grids against their definitions, value by value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srr_dist.errors import ConfigError
from srr_dist.solve.grids import PER_CHANNEL, AsymmetricIntGrid, IntGrid, MXIntGrid, dequantize, make_grid
from tests.solve.problems import weight, with_threads

BITS = range(2, 9)
KINDS = ("mxint", "int", "int-asym")


def bfloat16(value):
    return torch.tensor(value, dtype=torch.float32).bfloat16().item()


def by_definition(kind, bits, group):
    """Codes and scale of one group, from the formulas, one value at a time."""
    absmax = max(abs(value) for value in group)
    high = 2 ** (bits - 1) - 1
    if kind == "int-asym":
        bottom, top = min(0.0, *group), max(0.0, *group)
        scale = bfloat16(max((top - bottom) / (2**bits - 1), math.ldexp(1.0, -126)))
        low = round(bottom / scale)
        high = low + 2**bits - 1
    elif kind == "mxint":
        exponent = math.floor(math.log2(absmax)) - (bits - 2) if absmax else -126
        scale, low = math.ldexp(1.0, max(exponent, -126)), -(2 ** (bits - 1)) + 1
    else:
        scale, low = bfloat16(max(absmax / (2 ** (bits - 1) - 0.5), math.ldexp(1.0, -126))), -(2 ** (bits - 1))
    return [min(max(round(value / scale), low), high) for value in group], scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_quantize_random_weights_equal_the_definition(kind, bits):
    W = weight(6, 24, seed=bits)
    codes, scale = make_grid(kind, bits, 8).quantize(W)
    assert codes.dtype == (torch.int16 if kind == "int-asym" else torch.int8) and codes.shape == (6, 24)
    assert scale.dtype == torch.bfloat16 and scale.shape == (6, 3)
    for row in range(6):
        for group in range(3):
            columns = slice(8 * group, 8 * group + 8)
            expected, expected_scale = by_definition(kind, bits, W[row, columns].tolist())
            assert scale[row, group].item() == expected_scale
            assert codes[row, columns].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from(BITS),
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4),
)
def test_quantize_any_group_takes_the_nearest_point(kind, bits, values):
    grid = make_grid(kind, bits, 4)
    W = torch.tensor([values])
    codes, scale = grid.quantize(W)
    zero = grid.zero(codes)
    low, high = (end - (0 if zero is None else int(zero)) for end in grid.code_range)
    points = torch.arange(low, high + 1, dtype=torch.float64) * scale.double().item()
    Q = codes.double() * scale.double()
    nearest = (W.double()[..., None] - points).abs().amin(-1)
    assert int(codes.min()) >= low and int(codes.max()) <= high
    torch.testing.assert_close((W.double() - Q).abs(), nearest, rtol=1e-6, atol=0)


def test_quantize_ties_round_to_even():
    codes, scale = MXIntGrid(4, 8).quantize(torch.tensor([[4.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.5]]))
    assert scale.item() == 1.0
    assert codes.tolist() == [[4, 0, 2, 2, 0, -2, -2, 4]]


def test_mxint_two_bits_is_ternary():
    codes, scale = MXIntGrid(2, 4).quantize(torch.tensor([[1.9, -1.0, 0.5, -0.51]]))
    assert scale.item() == 1.0
    assert codes.tolist() == [[1, -1, 0, -1]]


@pytest.mark.parametrize("bits", BITS)
def test_mxint_is_idempotent_and_exact_in_bfloat16(bits):
    grid = MXIntGrid(bits, 32)
    codes, scale = grid.quantize(weight(8, 64))
    Q = grid.dequantize(codes, scale)
    again, scale_again = grid.quantize(Q)
    assert torch.equal(again, codes) and torch.equal(scale_again, scale)
    assert torch.equal(Q, codes.float() * scale.float().repeat_interleave(32, dim=1))


@pytest.mark.parametrize("bits", BITS)
def test_int_uses_both_ends_of_its_range(bits):
    W = torch.linspace(-1.0, 1.0, 2001)[None]
    grid = IntGrid(bits, PER_CHANNEL)
    codes, scale = grid.quantize(W)
    low, high = grid.code_range  # −1 lies half a step beyond low + 1, and the rounded scale decides
    assert int(codes.max()) == high and int(codes.min()) in (low, low + 1)
    # Half a step everywhere; the scale's own rounding, 2^-9 relative, adds up over the codes.
    worst = (W - codes.float() * scale.float()).abs().max() / scale.float()
    assert worst.item() <= 0.5 + 2 ** (bits - 1) * 2**-8


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_zero_group_gives_zero_codes_and_a_normal_scale(kind):
    W = torch.zeros(2, 8)
    W[1, 4:] = 1.0
    codes, scale = make_grid(kind, 3, 4).quantize(W)
    assert not codes[0].any() and codes[1, 4:].all()
    assert (scale.float() >= 2.0**-126).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-20, 1e20, 3e38])
def test_quantize_extreme_magnitudes_stay_finite(kind, magnitude):
    grid = make_grid(kind, 8, 4)
    codes, scale = grid.quantize(torch.tensor([[magnitude, -magnitude, 0.0, magnitude / 2]]))
    Q = grid.dequantize(codes, scale)
    assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(Q).all()
    if magnitude > 1e-35:
        assert Q[0, 0].item() == pytest.approx(magnitude, rel=2**-7)


@pytest.mark.parametrize("kind", KINDS)
def test_per_channel_group_is_one_group_of_the_whole_row(kind):
    W = weight(5, 24)
    channel = make_grid(kind, 4, PER_CHANNEL).quantize(W)
    whole = make_grid(kind, 4, 24).quantize(W)
    assert channel[1].shape == (5, 1)
    assert torch.equal(channel[0], whole[0]) and torch.equal(channel[1], whole[1])


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_leading_dimensions_are_independent(kind):
    W = torch.stack([weight(4, 16, seed=seed) for seed in range(3)])
    codes, scale = make_grid(kind, 3, 8).quantize(W)
    for index in range(3):
        one = make_grid(kind, 3, 8).quantize(W[index])
        assert torch.equal(codes[index], one[0]) and torch.equal(scale[index], one[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [-20, 7])
def test_quantize_power_of_two_scaling_moves_only_the_scale(kind, exponent):
    W = weight(4, 32)
    codes, scale = make_grid(kind, 3, 16).quantize(W)
    scaled_codes, scaled = make_grid(kind, 3, 16).quantize(W * 2.0**exponent)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(scale.float() * 2.0**exponent, scaled.float())


def test_dequantize_rounds_the_exact_product_once():
    grid = IntGrid(8, 4)
    codes, scale = grid.quantize(weight(16, 32))
    exact = codes.double() * scale.double().repeat_interleave(4, dim=1)
    assert torch.equal(dequantize(codes, scale, torch.float32).double(), exact)
    assert torch.equal(grid.dequantize(codes, scale), exact.float().bfloat16().float())
    assert not torch.equal(grid.dequantize(codes, scale).double(), exact)


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_is_bitwise_the_same_for_any_threads(kind):
    W, grid = weight(256, 512), make_grid(kind, 3, 32)
    first, second = (with_threads(threads, lambda: grid.quantize(W)) for threads in (1, 2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_quantize_inputs_no_multiple_of_the_group_names_the_field():
    grid = MXIntGrid(3, 32)
    assert not grid.fits(40) and grid.fits(64)
    with pytest.raises(ConfigError, match=r"group_size: 40 inputs are no multiple of 32.*--group-size"):
        grid.quantize(weight(2, 40))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mxint", 1, 32), "bits: expected 2 to 8, found 1"),
        (("int", 9, 32), "bits: expected 2 to 8, found 9"),
        (("int", 4, 0), "group_size: expected a positive number or -1"),
        (("fp4", 4, 64), "grid: expected one of mxint, int, int-asym, nf4, found 'fp4'"),
    ],
)
def test_make_grid_wrong_value_names_the_field(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_grid(*arguments)


@settings(max_examples=60, deadline=None)
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 2**31), shift=st.floats(-3.0, 3.0))
def test_zero_points_have_the_width_of_codes_and_let_every_code_be_stored(bits, seed, shift):
    grid = AsymmetricIntGrid(bits, 8)
    low, high = grid.code_range
    W = 100 * weight(5, 16, seed=seed) + shift
    for scale, zero in grid.candidates(W):
        codes = grid.encode(W, scale, zero)
        assert (scale > 0).all() and torch.equal(zero, zero.round())
        for kept in (zero, grid.zero(codes)):
            stored = codes + kept.repeat_interleave(8, dim=-1)
            assert low <= int(kept.min()) and int(kept.max()) <= high
            assert low <= int(stored.min()) and int(stored.max()) <= high


def test_zero_point_is_the_nearest_to_0_that_the_codes_allow():
    codes = torch.tensor([[-1, 2, 0, 3], [-6, 0, -2, 1], [0, 7, 3, 2], [-4, 0, 0, 3], [0, 0, 0, 0]], dtype=torch.int16)
    assert AsymmetricIntGrid(3, 4).zero(codes).flatten().tolist() == [0, 2, -4, 0, 0]
    assert IntGrid(3, 4).zero(codes) is None


@pytest.mark.parametrize("bits", BITS)
def test_int_asym_takes_all_its_codes_where_weights_lie_on_one_side(bits):
    W = torch.linspace(0.0, 2**bits - 1, 2001)[None]
    for side in (1, -1):
        codes, scale = AsymmetricIntGrid(bits, PER_CHANNEL).quantize(side * W)
        assert sorted({side * code for code in codes.flatten().tolist()}) == list(range(2**bits))
        assert scale.item() == 1.0


def test_bits_per_weight_counts_codes_and_scales():
    assert make_grid("mxint", 3, 32).bits_per_weight(576) == 3.5
    assert make_grid("int", 4, PER_CHANNEL).bits_per_weight(64) == 4.25
    assert make_grid("int-asym", 4, 32).bits_per_weight(576) == 4 + (16 + 4) / 32
    assert make_grid("int-asym", 3, PER_CHANNEL).bits_per_weight(64) == 3 + (16 + 3) / 64
