"""Input moments against xᵀx in float64, sequence by sequence."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srr_dist.calibration import InputMoment, first_token_weight, moment_bytes, waiting_bytes
from srr_dist.calibration.moments import accumulator_shape
from tests.solve.problems import with_threads

SCALINGS = ("exact", "diag", "lqer", "identity")


def sequences(count, tokens, features, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.logspace(1, -2, features)
    return [(torch.randn(tokens, features, generator=generator) * spread).to(dtype) for _ in range(count)]


def accumulated(xs, scaling, features=None, first=1, **options):
    moment = InputMoment(features or xs[0].shape[1], scaling, **options)
    for x in xs:
        moment.update(x, first)
    return moment


def by_definition(xs, scaling):
    tokens = torch.cat(xs).double()
    match scaling:
        case "exact":
            return tokens.mT @ tokens / len(tokens)
        case "diag":
            return tokens.square().mean(0)
        case "lqer":
            s = torch.stack([x.double().abs().mean(0) for x in xs]).amax(0).clamp_min(1e-4)
            return (s / (s.min() * s.max()).sqrt()).square()
        case "identity":
            return torch.ones(tokens.shape[1], dtype=torch.float64)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [1, 3, 4, 37, 64])
def test_value_equals_the_definition_in_float64(scaling, dtype, features):
    xs = sequences(5, 33, features, dtype)
    moment = accumulated(xs, scaling)
    value = moment.value()
    assert value.dtype == torch.float64 and value.shape == accumulator_shape(features, scaling)
    expected = by_definition(xs, scaling)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
    assert (moment.tokens, moment.excluded) == (165, 0)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [1, 2, 32])
def test_first_token_counts_as_if_it_stood_there_so_often(scaling, dtype, first):
    xs = sequences(4, 20, 24, dtype)
    repeated = [torch.cat((x[:1].expand(first - 1, -1), x)) for x in xs]
    moment, expected = accumulated(xs, scaling, first=first), by_definition(repeated, scaling)
    torch.testing.assert_close(moment.value(), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))
    assert (moment.tokens, moment.weight) == (80, 80 + 4 * (first - 1))


@pytest.mark.parametrize(("tokens", "weight"), [(2048, 63), (1024, 32), (128, 4), (24, 1), (2, 1)])
def test_first_token_of_short_and_long_sequences_has_about_its_share(tokens, weight):
    assert first_token_weight(0.03, tokens) == weight
    assert first_token_weight(0.0, tokens) == 1
    assert first_token_weight(0.5, tokens) == tokens - 1


def test_no_other_token_counts_for_a_first_one_that_is_left_out():
    (x,) = sequences(1, 12, 16)
    spoiled = x.clone()
    spoiled[0, 3] = float("nan")
    moment = accumulated([spoiled], "exact", first=32)
    assert (moment.tokens, moment.excluded, moment.weight) == (11, 1, 11)
    assert torch.equal(moment.value(), accumulated([x[1:]], "exact").value())


@pytest.mark.parametrize("features", [3, 37, 64])
def test_exact_value_is_symmetric_to_the_bit_and_semidefinite(features):
    value = accumulated(sequences(4, 50, features), "exact").value()
    assert torch.allclose(value, value.mT, rtol=1e-5, atol=1e-6)
    width = -(-features // 4)
    assert torch.equal(value[:width, width:], value[width:, :width].mT)
    assert torch.linalg.eigvalsh((value + value.mT) / 2)[0] > -1e-6 * value.diagonal().max()


@pytest.mark.parametrize("scaling", SCALINGS)
def test_value_can_be_read_between_updates(scaling):
    xs = sequences(6, 20, 24)
    moment = InputMoment(24, scaling)
    for x in xs[:3]:
        moment.update(x)
    assert torch.equal(moment.value(), accumulated(xs[:3], scaling).value())
    for x in xs[3:]:
        moment.update(x)
    expected = accumulated(xs, scaling).value()
    torch.testing.assert_close(moment.value(), expected, rtol=1e-5, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_value_that_is_taken_is_the_same_to_the_bit(scaling):
    moment = accumulated(sequences(4, 20, 37), scaling)
    expected, total = moment.value(), moment.total
    taken = moment.take()
    assert torch.equal(taken, expected)
    assert (moment.tokens, moment.excluded) == (80, 0)
    assert (taken is total) == (scaling == "exact")  # the sums' own memory, which the moment has no part in any more
    assert (moment.total.numel() == 0) == (scaling == "exact")


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 7), max_size=5), scaling=st.sampled_from(SCALINGS))
def test_value_does_not_depend_on_how_sequences_are_grouped(cuts, scaling):
    batch = torch.stack(sequences(8, 10, 12))
    reference = accumulated(list(batch), scaling).value()
    moment = InputMoment(12, scaling)
    edges = [0, *sorted(set(cuts)), 8]
    for first, last in pairwise(edges):
        for x in batch[first:last]:  # a message holds several sequences; each is added by itself
            moment.update(x)
    assert torch.equal(moment.value(), reference)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_is_bitwise_the_same_for_any_threads(scaling, dtype):
    xs = sequences(3, 1024, 192, dtype)
    first, second, again = (with_threads(n, lambda: accumulated(xs, scaling).value()) for n in (1, 2, 2))
    assert torch.equal(first, second) and torch.equal(second, again)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_view_of_a_batch_equals_its_copy(scaling):
    views = list(torch.stack(sequences(2, 16, 20), dim=-1).unbind(-1))  # every second number
    copies = [x.contiguous() for x in views]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(
        accumulated(views, scaling).value(), accumulated(copies, scaling).value(), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_rows_are_left_out_and_counted(scaling, bad, dtype):
    xs = sequences(3, 12, 16, dtype)
    spoiled = [x.clone() for x in xs]
    spoiled[0][4, 7] = bad
    spoiled[2][0], spoiled[2][11, 0] = bad, -bad
    clean = [xs[0][[*range(4), *range(5, 12)]], xs[1], xs[2][1:11]]
    moment = accumulated(spoiled, scaling)
    assert (moment.tokens, moment.excluded) == (33, 3)
    assert torch.equal(moment.value(), accumulated(clean, scaling).value())


def test_opposite_infinities_in_one_row_do_not_cancel():
    x = torch.ones(3, 4)
    x[1, 0], x[1, 1] = float("inf"), float("-inf")
    assert accumulated([x], "exact").excluded == 1


@pytest.mark.parametrize("scaling", SCALINGS)
def test_all_bad_input_counts_and_leaves_nothing(scaling):
    moment = accumulated([torch.full((5, 8), float("nan"))] * 2, scaling)
    assert (moment.tokens, moment.excluded) == (0, 10)
    expected = torch.zeros(accumulator_shape(8, scaling), dtype=torch.float64)
    assert torch.equal(moment.value(), expected + 1 if scaling == "identity" else expected)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_empty_sequence_changes_nothing(scaling):
    xs = sequences(2, 9, 8)
    moment = accumulated([xs[0], xs[0][:0], xs[1]], scaling)
    assert moment.tokens == 18 and torch.equal(moment.value(), accumulated(xs, scaling).value())


def test_lqer_is_the_largest_mean_over_sequences_between_reciprocal_ends():
    quiet, loud = torch.tensor([[1.0, 4.0, 0.0]] * 2), torch.tensor([[-3.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    value = accumulated([quiet, loud], "lqer").value()
    s = torch.tensor([3.0, 4.0, 1e-4], dtype=torch.float64)  # a silent input is held at 1e-4
    torch.testing.assert_close(value, (s / (4.0 * 1e-4) ** 0.5).square())
    assert value.max().item() * value.min().item() == pytest.approx(1.0)


def test_bfloat16_products_are_exact_in_float32():
    x = torch.tensor([[1.0078125, 3.015625]], dtype=torch.bfloat16)  # squares need 16 bits
    value = accumulated([x], "exact").value()
    assert torch.equal(value, x.double().mT @ x.double())


def test_sums_over_sequences_keep_what_float32_would_lose():
    large, small = torch.full((512, 1), 4096.0), torch.full((512, 1), 1.0)
    moment = accumulated([large, *[small] * 64], "exact")
    assert moment.value().item() * moment.tokens == 512 * (4096.0**2 + 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [1, 4])
def test_short_sequences_are_summed_as_one_that_is_long(dtype, first):
    (x,) = sequences(1, 1024, 24, dtype)
    short = accumulated(x.split(128), "exact", first=first)
    weighted = x.clone()
    weighted[::128] *= first
    long = InputMoment(24, "exact")
    for rows, weights in zip(x.split(512), weighted.split(512), strict=True):
        long.add(weights, rows, rows=0)
    long.tokens, long.weight = short.tokens, short.weight
    assert torch.equal(short.value(), long.value())


def test_sequences_may_be_written_to_once_they_were_added():
    xs = sequences(3, 100, 8)
    expected = accumulated(xs, "exact").value()
    moment = InputMoment(8, "exact")
    for x in xs:
        moment.update(x)
        x.zero_()
    assert torch.equal(moment.value(), expected)


@pytest.mark.parametrize(("rows", "waits"), [(128, True), (511, True), (512, False), (2048, False)])
def test_rows_of_short_sequences_alone_wait_and_take_as_much_as_is_planned(rows, waits):
    moment, most = InputMoment(24, "exact"), 0
    for x in sequences(12, rows, 24):
        moment.update(x, first=2)
        most = max(most, sum(part.nbytes for pair in moment._waiting for part in pair))
    planned = waiting_bytes(rows, 24, "exact")
    assert most == planned
    assert bool(most) == waits
    moment.clear()
    assert torch.equal(moment.value(), torch.zeros(24, 24, dtype=torch.float64))


def test_given_total_is_added_into():
    xs = sequences(3, 10, 8)
    total = torch.zeros(8, 8, dtype=torch.float64)
    moment = accumulated(xs, "exact", total=total)
    assert moment.total is total and torch.equal(moment.value(), accumulated(xs, "exact").value())


@pytest.mark.parametrize("total", [torch.zeros(8, dtype=torch.float64), torch.zeros(8, 8)])
def test_given_total_of_another_shape_or_type_is_refused(total):
    with pytest.raises(ValueError, match=r"total: expected float64 \(8, 8\)"):
        InputMoment(8, "exact", total=total)


def test_moment_bytes_is_the_size_of_the_accumulator():
    for scaling in SCALINGS:
        total = InputMoment(24, scaling).total
        assert moment_bytes(24, scaling) == total.numel() * total.element_size()
