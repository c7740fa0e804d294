"""The forecast: what is counted against numbers worked out by hand, how time is laid out, and what is printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from srr_dist import plan as verb
from srr_dist.checkpoint.graph import Block, Linear
from srr_dist.config import JobConfig, QuantizeConfig, jobs_folder
from srr_dist.errors import ConfigError
from srr_dist.pipeline import operations, prepare
from srr_dist.pipeline.cluster import Cluster
from srr_dist.pipeline.forecast import Costs, Forecast, flow, forecast, side_by_side
from srr_dist.pipeline.hardware import Hardware, imagined_cluster, known_hardware, load_hardware
from srr_dist.pipeline.memory import Budget
from srr_dist.pipeline.operations import KINDS, LayerWork, Work
from srr_dist.pipeline.plan import Plan, make_plan
from srr_dist.solve import Quantizer, SolveOptions, make_grid

OPTIONS = SolveOptions("srr", Quantizer(make_grid("mxint", 3, 32), "search", "gptq"), rank=8, split="search")
UNIT = Hardware("UNIT", "a unit", "", None, 2**40, 10.0, dict.fromkeys(KINDS, 1e6))
"""Every kind of work at one rate."""


def block() -> Block:
    """Two layers that share an input of 4, and one with an input of 8."""
    linears = (Linear("q", 4, 4, "q"), Linear("k", 2, 4, "q"), Linear("down", 4, 8, "down"))
    return Block(0, "block", ("q.weight",), linears, nbytes=100)


def make(six_blocks: Path, text: Path, workers: int = 1, **changes) -> Plan:
    options = {"rank": 4, "num_samples": 8, "seq_len": 32} | changes
    config = QuantizeConfig(model=str(six_blocks), calibration=str(text), **options)
    run = prepare.make_run(prepare.open_sources(config), "memory://plan", on_gpu=False)
    return make_plan(run, Cluster(workers, cpus=1, gpus=0, budget=Budget(2**40, None)), 4)


def test_pass_is_two_operations_a_weight_and_token_and_attention_over_half_of_the_pairs():
    assert operations.passing(block(), seq_len=10, hidden_size=4) == Work(forward=2 * 10 * (16 + 8 + 32) + 2 * 100 * 4)


def test_moments_are_five_eighths_of_a_matrix_for_each_shared_input():
    layers, entries = frozenset({"q", "k", "down"}), 0.625 * (16 + 64)
    found = operations.moments(block(), layers, 10, "exact", away=False)
    assert found == Work(moments=2 * 10 * entries, elementwise=32 * entries)
    away = operations.moments(block(), layers, 10, "exact", away=True)
    assert away == Work(moments=2 * 10 * entries, link=4 * entries, host=32 * entries)
    assert operations.moments(block(), frozenset({"q"}), 10, "diag", away=False) == Work(elementwise=12 * 10 * 4)
    assert operations.moments(block(), layers, 10, "identity", away=False) == Work()


def test_two_krylov_steps_by_hand():
    """m = 10, b = 2: bases of 2 and 4 columns."""
    thin = (
        2 * 10 * 2 * 2 + 2 * 10 * 4 * 2 + 2 * 4 * 10 * 2 * 2 + 2 * 10 * 4 * 2
    )  # two borders, projected twice, rotated
    expected = Work(products=14, thin=thin, reflections=3 * 4 * 10 * 4, eigen=2**3 + 4**3)
    assert operations.krylov(10, 2, 2, Work(products=7)) == expected


@pytest.mark.parametrize(
    ("method", "split", "rank", "expected"),
    [("srr", "search", 32, (12, 3)), ("srr", "search", 4, (6, 3)), ("srr", "criterion", 32, (0, 2)),
     ("srr", "fixed:3", 32, (0, 3)), ("qer", "search", 32, (0, 1)), ("none", "search", 0, (0, 1))],
)  # fmt: skip
def test_candidates_of_k(method, split, rank, expected):
    options = replace(OPTIONS, method=method, split=split, rank=rank)
    assert LayerWork(64, 64, options, full=True).candidates() == expected
    plain = replace(options, quantizer=Quantizer(options.quantizer.grid))
    if split == "search" and method == "srr":  # what compares is then what judges
        assert LayerWork(64, 64, plain, full=True).candidates() == (expected[0], 0)


def test_energy_takes_each_pair_of_inputs_once():
    assert LayerWork(10, 32, OPTIONS, full=True).energy() == Work(products=1.125 * 10 * 32**2, elementwise=20 * 320)
    assert LayerWork(10, 32, OPTIONS, full=False).energy() == Work(elementwise=20 * 320)


def test_error_feedback_costs_a_product_and_calls_for_each_input():
    fed, nearest = (
        LayerWork(10, 32, replace(OPTIONS, quantizer=replace(OPTIONS.quantizer, rounding=rounding)), full=True)
        for rounding in ("gptq", "nearest")
    )
    first, second = (work.rounding(work.options.quantizer) for work in (fed, nearest))
    assert (first.products, second.products) == (10 * 32**2, 0)
    assert first.calls - second.calls == 9 * 32


@pytest.mark.parametrize(("grid", "products"), [("mxint", 3), ("int", 5)])
def test_each_descent_costs_products_and_calls_for_each_input(grid, products):
    options = replace(OPTIONS, method="none", quantizer=Quantizer(make_grid(grid, 3, 32), "search", "gptq"))
    still, moving = (LayerWork(10, 32, replace(options, descent=n), full=True).solve() for n in (0, 2))
    energy = LayerWork(10, 32, options, full=True).energy().products
    assert moving.products - still.products == 2 * (products * 10 * 32**2 + energy)
    assert moving.calls - still.calls == 2 * 9 * 32
    diagonal = (LayerWork(10, 32, replace(options, descent=n), full=False).solve() for n in (0, 2))
    assert len(set(diagonal)) == 1


@pytest.mark.parametrize(("grid", "fitted"), [("mxint", 0), ("int", 1)])
def test_a_metric_of_two_sides_costs_feedback_and_descent_along_outputs_as_well(grid, fitted):
    options = replace(OPTIONS, method="none", quantizer=Quantizer(make_grid(grid, 3, 32), "search", "yaqa"))
    m, n = 16, 32
    still, moving = (LayerWork(m, n, replace(options, descent=count), full=True) for count in (0, 2))
    energy = still.energy().products
    fit = fitted * (7 * 2 * m * n * (m + n) + 2 * (energy + m * m * n))
    assert still.two_sided().products - still.solve().products == m * m * n
    each = (3 + 2) * m * n * n + 2.25 * m * m * n + energy + fit
    assert moving.two_sided().products - still.two_sided().products == 2 * each
    assert moving.two_sided().calls - still.two_sided().calls == 2 * 8 * n * 9


def test_outputs_in_bands_have_less_to_do_with_each_other():
    options = replace(
        OPTIONS, quantizer=Quantizer(make_grid("int", 3, 32), "search", "yaqa"), descent=2, rounding_metric="downdated"
    )
    whole, banded = (LayerWork(64, 32, options, full=True, bands=bands) for bands in (1, 4))
    assert whole.solve() == banded.solve()
    both = whole.two_sided(), banded.two_sided()
    assert both[0].products - both[1].products == pytest.approx(0.75 * 64 * 64 * 32 * (3 + 2 * (2.25 + 2 * 7 + 2)))
    assert both[0].cholesky - both[1].cholesky == pytest.approx((64**3 - 4 * 16**3) / 3 * (1 + 2))
    alone = Block(0, "b", (), (Linear("q", 64, 32, "q"),), 0)
    groups = [operations.solving(alone, frozenset({"q"}), options, full=True, band=band) for band in (0, 16)]
    assert groups[0][0].products - groups[1][0].products == pytest.approx(both[0].products - both[1].products)


def test_looking_codes_up_costs_bytes_wherever_codes_are_taken():
    table, integers = (Quantizer(make_grid(grid, 4, 32), "absmax", "gptq") for grid in ("nf4", "int"))
    more, less = (LayerWork(10, 64, replace(OPTIONS, quantizer=q), full=True) for q in (table, integers))
    assert more.rounding(table).elementwise > less.rounding(integers).elementwise
    assert more.rounding(table).feedback > less.rounding(integers).feedback
    assert more.descent().feedback > less.descent().feedback
    assert more.descent().products == less.descent().products


def test_each_iteration_beyond_the_adapter_factors_a_moment():
    once, thrice = (
        LayerWork(64, 32, replace(OPTIONS, iterations=n, rounding_metric="downdated"), full=True).solve().cholesky
        for n in (1, 3)
    )
    assert (once, thrice) == (32**3 / 3, 32**3)
    assert LayerWork(64, 32, replace(OPTIONS, iterations=3), full=True).solve().cholesky == 0


def test_layers_that_share_an_input_share_its_factor():
    wide = tuple(Linear(name, 64, 32, "q") for name in ("q", "k"))
    groups = operations.solving(Block(0, "b", (), wide, 0), frozenset({"q", "k"}), OPTIONS, full=True)
    assert [group.cholesky for group in groups] == [32**3 / 3]


def test_tuning_takes_three_passes_a_sequence_and_six_looks_at_those_held_out():
    one = Work(forward=100)
    found = operations.tuning(block(), frozenset({"q"}), one, rank=2, steps=5, batch=4, held=3)
    assert found.forward == 5 * 4 * 3 * 100 + 6 * 3 * 100
    assert operations.tuning(block(), frozenset({"q"}), one, rank=2, steps=0, batch=4, held=3) == Work()


def test_weighing_rounds_each_layer_at_every_width_and_forms_each_gradient_once():
    quantizer = Quantizer(OPTIONS.quantizer.grid, "search")
    once = LayerWork(4, 8, OPTIONS, full=False).rounding(quantizer)
    counts = {"widths": 7, "held_out": 3, "seq_len": 16}
    found = operations.weighing(block(), frozenset({"down"}), quantizer, **counts)
    assert found.products == 3 * 2 * 16 * 4 * 8
    assert found.calls == 7 * once.calls > 0
    assert found.elementwise == 7 * once.elementwise + 3 * 4 * 8 * operations._SQUARE_BYTES


def test_bits_to_spend_take_time_to_weigh_before_anything_is_solved(six_blocks, text):
    plain, spent = (forecast(make(six_blocks, text, sketch="B", mean_bits=mean), UNIT) for mean in (0.0, 3.0))
    assert "weighing" not in plain.seconds
    assert spent.seconds == plain.seconds | {"weighing": spent.seconds["weighing"]}
    assert spent.seconds["weighing"] > 0
    halved = forecast(make(six_blocks, text, workers=6, sketch="B", mean_bits=3.0), UNIT).seconds["weighing"]
    assert halved == pytest.approx(spent.seconds["weighing"] / 6)


def test_work_takes_the_sum_of_its_kinds_at_their_rates():
    assert Work(forward=6, write=10).seconds({"forward": 2.0, "write": 5.0}) == 5.0


def test_messages_flow_through_stages():
    assert flow([1.0, 1.0, 1.0], [1, 1, 1, 1]) == 6.0  # the last enters after 3 and takes 3
    assert flow([1.0, 3.0], [2, 2]) == 2.0 + 6.0 + 6.0  # the second stage never waits again


def test_tasks_side_by_side_begin_where_there_is_room():
    assert side_by_side([3.0, 1.0, 1.0, 2.0], 2) == 4.0
    assert side_by_side([3.0, 1.0], 1) == 4.0


def test_more_workers_never_take_longer(six_blocks, text):
    hours = [forecast(make(six_blocks, text, workers), UNIT).hours for workers in (1, 2, 3, 6, 12)]
    assert hours == sorted(hours, reverse=True)
    assert hours[-1] < hours[0]


def test_twice_the_sequences_take_twice_the_calibration_and_no_more_solving(six_blocks, text):
    few, many = (forecast(make(six_blocks, text, num_samples=n), UNIT).seconds for n in (8, 16))
    assert many["calibrating"] == pytest.approx(2 * few["calibrating"])
    assert many["solving"] == few["solving"]


def test_stage_stores_and_reads_beside_its_solving(six_blocks, text):
    """Of two windows of four and two blocks on one worker, the second is read while the first is solved."""
    plan = make(six_blocks, text)
    read = Costs(plan, UNIT).read(plan.run.graph.blocks[0])
    slow = replace(UNIT, rates=UNIT.rates | {"read": 1.0})
    assert forecast(plan, UNIT).seconds["reading"] < 5 * read + 1  # the first window, and what is outside the blocks
    assert forecast(plan, slow).seconds["reading"] > 5 * read * 1e6  # too slow to keep up with


def test_storage_traffic_has_boundaries_both_ways(six_blocks, text):
    traffic = (plan := make(six_blocks, text)).traffic()
    boundary = 8 * 32 * 64 * 4
    assert traffic["boundaries written and read"] == boundary
    assert forecast(plan, UNIT).stored == traffic["source read"] + traffic["result written"] + 2 * boundary


def test_run_without_a_text_passes_nothing(six_blocks):
    config = QuantizeConfig(model=str(six_blocks), scaling="identity", rank=4)
    run = prepare.make_run(prepare.open_sources(config), "memory://plan", on_gpu=False)
    plan = make_plan(run, Cluster(1, cpus=1, gpus=0, budget=Budget(2**40, None)), 4)
    assert forecast(plan, UNIT).seconds["calibrating"] == 0
    assert forecast(plan, UNIT).seconds["solving"] > 0


@pytest.mark.parametrize("kind", known_hardware())
def test_every_kind_has_a_rate_above_zero_for_every_kind_of_work(kind):
    hardware = load_hardware(kind)
    assert all(rate > 0 for rate in hardware.rates.values())
    assert tuple(sorted(hardware.rates)) == tuple(sorted(KINDS))


def test_no_gpu_is_said_to_be_measured_and_the_cpu_is():
    assert {kind for kind in known_hardware() if load_hardware(kind).measured} == {"CPU"}
    source = (jobs_folder("hardware") / "h100.yaml").read_text()
    assert "data sheet" in source


def test_gpus_stand_for_workers_with_nine_tenths_of_their_memory():
    cluster, hardware = imagined_cluster("8xH100", JobConfig())
    assert (cluster.workers, cluster.gpus, cluster.cpus) == (8, 1, 1)
    assert hardware.gpu_memory == 79 * 2**30
    assert cluster.budget == Budget(host=128 * 2**30, gpu=int(0.9 * 79 * 2**30))
    told = imagined_cluster("2xa100", JobConfig(gpu_memory="40GiB", host_memory="16GiB"))[0]
    assert (told.workers, told.budget) == (2, Budget(16 * 2**30, 40 * 2**30))
    assert imagined_cluster("2xCPU", JobConfig())[0].gpus == 0


@pytest.mark.parametrize(
    ("gpus", "job", "message"),
    [
        ("8xB9000", {}, "gpus: no figures for 'B9000'; known are A100, CPU, H100, H200"),
        ("H100", {}, "gpus: expected a number and a kind as 8xH100, found 'H100'"),
        ("0xH100", {}, "gpus: expected a number and a kind"),
        ("8xH100", {"workers": 4}, "workers: 4, but --gpus 8xH100 stands for 8 workers"),
    ],
)
def test_gpus_that_are_not_known_are_refused(gpus, job, message):
    with pytest.raises(ConfigError) as caught:
        imagined_cluster(gpus, JobConfig(**job))
    assert str(caught.value).startswith(message)


def test_price_is_worker_hours_at_the_price_and_printed_only_where_given():
    found = Forecast(UNIT, 8, {"starting": 1800.0, "solving": 5400.0}, stored=2**30)
    assert (found.hours, found.price(2.5)) == (2.0, 40.0)
    assert "cost" not in found.describe()
    assert "cost           40.00 (16.00 worker hours at 2.5;" in found.describe(2.5)
    assert "hours          2.00 (starting 0.50, solving 1.50)" in found.describe()
    assert "NOT CALIBRATED" in found.describe()
    assert "measured on X" in replace(found, hardware=replace(UNIT, measured="X")).describe()


def arguments(six_blocks: Path, text: Path, *more: str) -> list[str]:
    fixed = ["--model", str(six_blocks), "--calibration", str(text), "--num-samples", "8", "--seq-len", "32"]
    return [*fixed, "--rank", "4", *more]


def test_plan_for_gpus_needs_no_cluster_and_prints_hours_and_with_a_price_cost(six_blocks, text, capsys):
    assert verb.main(arguments(six_blocks, text, "--gpus", "2xH100")) == 0
    shown = capsys.readouterr().out
    assert "workers        2 × (1 CPU, 1 GPU)" in shown
    assert "forecast       2 × NVIDIA H100 SXM, 80 GB; NOT CALIBRATED" in shown
    assert "hours   " in shown
    assert "cost" not in shown
    assert verb.main(arguments(six_blocks, text, "--gpus", "2xH100", "--gpu-hour", "3")) == 0
    assert "worker hours at 3;" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--gpu-hour", "3"], ["--gpus", "1xH100", "--gpu-hour", "0"]])
def test_price_without_gpus_or_of_nothing_is_refused(six_blocks, text, capsys, more):
    assert verb.main(arguments(six_blocks, text, *more)) == 2
    assert "gpu_hour: expected a price above 0 for an hour of one of --gpus" in capsys.readouterr().err
