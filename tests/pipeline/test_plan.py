"""The plan of a run: what each worker is told and what a person is shown, from arithmetic alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from srr_dist.config import QuantizeConfig
from srr_dist.errors import ConfigError
from srr_dist.pipeline import prepare
from srr_dist.pipeline.cluster import Cluster
from srr_dist.pipeline.memory import PROCESS_BYTES, Budget
from srr_dist.pipeline.plan import Plan, make_plan, output_bytes, smaller
from srr_dist.pipeline.run import Run
from srr_dist.pipeline.stage_plan import stage_plans
from tests.families import build

PLENTY = Budget(2**40, None)


@pytest.fixture(scope="module")
def model(six_blocks: Path) -> Path:
    return six_blocks


def make_run(model: Path, text: Path | None, **changes) -> Run:
    options = {"rank": 4, "num_samples": 8, "seq_len": 32} | changes
    config = QuantizeConfig(model=str(model), calibration=str(text or ""), **options)
    return prepare.make_run(prepare.open_sources(config), "memory://plan", on_gpu=False)


def plan(run: Run, workers: int = 1, blocks_per_stage: int = 4, budget: Budget = PLENTY) -> Plan:
    return make_plan(
        run, Cluster(workers, cpus=1, gpus=0 if budget.gpu is None else 1, budget=budget), blocks_per_stage
    )


@pytest.mark.parametrize(
    ("workers", "per_stage", "expected"),
    [
        (1, 4, [[(0, 1, 2, 3)], [(4, 5)]]),
        (1, 1, [[(block,)] for block in range(6)]),
        (2, 4, [[(0, 1, 2), (3, 4, 5)]]),
        (2, 2, [[(0, 1), (2, 3)], [(4,), (5,)]]),
        (9, 4, [[(block,) for block in range(6)]]),
    ],
)
def test_windows_share_the_blocks_among_the_workers(model, text, workers, per_stage, expected):
    found = plan(make_run(model, text), workers, per_stage)
    assert [list(window.stages) for window in found.windows] == expected


def test_windows_shrink_where_memory_is_short(model, text):
    run = make_run(model, text)
    two, three = (plan(run, blocks_per_stage=count).holding.host_bytes for count in (2, 3))
    for allowed, blocks in ((three, 3), (three - 1, 2), (two, 2), (two - 1, 1)):
        found = plan(run, budget=Budget(allowed, None)).holding
        assert (found.blocks, found.placement) == (blocks, "host")
        assert found.host_bytes <= allowed


def test_plan_that_does_not_fit_is_refused(model, text):
    with pytest.raises(ConfigError, match=r"^host_memory: .*model\.layers\.\d"):
        plan(make_run(model, text), budget=Budget(PROCESS_BYTES, None))


def test_smaller_plan_has_half_the_blocks_until_one_is_left(model, text):
    sizes, found = [], plan(make_run(model, text))
    while found is not None:
        sizes.append(found.holding.blocks)
        found = smaller(found)
    assert sizes == [4, 2, 1]


def test_stages_are_told_where_sequences_enter_and_leave(model, text):
    found = plan(make_run(model, text), workers=2, blocks_per_stage=2)
    first, second = (stage_plans(window, number, found.planned_memory()) for number, window in enumerate(found.windows))
    assert [(part.start, part.save, part.last) for part in first] == [(0, None, False), (None, 4, True)]
    assert [(part.start, part.save, part.last) for part in second] == [(4, None, False), (None, None, True)]
    assert [(part.stage, part.window, part.blocks) for part in second] == [(0, 1, (4,)), (1, 1, (5,))]
    assert all(part.collect == frozenset(part.blocks) for part in first + second)
    assert first[0].planned_memory == {"host": found.holding.host_bytes}


def test_run_without_calibration_reads_and_stores_no_boundary(model):
    found = plan(make_run(model, None, scaling="identity"), blocks_per_stage=2)
    parts = [
        part
        for number, window in enumerate(found.windows)
        for part in stage_plans(window, number, found.planned_memory())
    ]
    assert [(part.start, part.save) for part in parts] == [(None, None)] * 3
    assert found.traffic()["boundaries written and read"] == 0


def test_description_shows_blocks_windows_memory_and_bytes(model, text):
    lines = plan(make_run(model, text, exclude="down_proj")).describe().splitlines()
    shown = {line.split("  ")[0]: line for line in lines}
    assert str(model) in shown["model"]
    assert "6, with 36 linear layers to quantize and 6 left as they are" in shown["blocks"]
    assert (
        "srr, rank 4, split search, joint form, 3 iterations and 3 of descent in the downdated metric"
        in shown["method"]
    )
    assert "exact scaling, shrinkage 0.1" in shown["method"]
    assert "int 3 bits, group 64, search scales, gptq rounding" in shown["quantizer"]
    assert "8 sequences of 32 tokens" in shown["calibration"]
    assert "2, up to 4 blocks per stage, moments on host" in shown["windows"]
    assert "planned" in shown["memory"]
    assert "GiB" in shown["source read"]
    assert "blocks 0–3" in shown["window 0"]
    assert "blocks 4–5" in shown["window 1"]


def test_description_of_a_gpu_plan_shows_both_memories(model, text):
    shown = plan(make_run(model, text), budget=Budget(2**40, 2**40)).describe()
    assert "host per worker" in shown
    assert "gpu per worker" in shown
    assert "moments on device" in shown


def test_output_bytes_are_those_of_codes_scales_adapters_and_rest(model, text):
    run = make_run(model, text, bits=3, group_size=32, rank=4)
    shapes = [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    codes = sum(m * n * 3 // 8 for m, n in shapes)
    scales = sum(2 * m * n // 32 for m, n in shapes)
    factors = sum(2 * 4 * (m + n) for m, n in shapes)
    rest = 4 * (2 * 320 * 64 + 64)
    found = output_bytes(run)
    assert found <= 6 * (codes + scales + factors) + rest
    assert found >= 6 * (codes + scales / 2 + factors) + rest  # a power-of-two scale is a byte of information


def test_output_bytes_and_description_count_layers_of_other_widths(model, text):
    plain, mixed = (make_run(model, text, bits=3, group_size=32, widths=widths) for widths in ("", "up_proj=5"))
    more = sum(
        linear.out_features * linear.in_features * 2 / 8
        for block in plain.graph.blocks
        for linear in block.linears
        if linear.name.endswith("up_proj")
    )
    assert output_bytes(mixed) - output_bytes(plain) == pytest.approx(more, abs=1)
    shown = [next(line for line in plan(run).describe().splitlines() if "quantizer" in line) for run in (plain, mixed)]
    assert "int 3 bits, group 32" in shown[0]
    assert "int 3 (36 layers), 5 (6 layers) bits, group 32" in shown[1]


def test_bits_to_spend_on_the_average_are_planned_for(model, text):
    options = {"seq_len": 256, "sketch": "B", "scaling": "diag", "iterations": 0, "descent": 0}
    plain, spent = (make_run(model, text, group_size=32, mean_bits=mean, **options) for mean in (0.0, 4.5))
    more = sum(linear.out_features * linear.in_features for block in plain.graph.blocks for linear in block.linears)
    assert output_bytes(spent) - output_bytes(plain) == pytest.approx(1.5 * more / 8, abs=1)
    assert plan(spent).traffic()["source read"] == 2 * plan(plain).traffic()["source read"]
    assert plan(spent).needs[0].solve > plan(plain).needs[0].solve
    assert "int 4.5 (mean) bits, group 32" in plan(spent).describe()


def test_output_bytes_count_zero_points(model, text):
    having, without = (
        output_bytes(make_run(model, text, bits=4, group_size=32, grid=grid)) for grid in ("int-asym", "int")
    )
    weights = 3 * 64 * 128 + 2 * 64 * 64 + 2 * 32 * 64
    assert having - without == 6 * weights // 32 * 4 // 8


def test_output_bytes_count_float32_scales(model, text):
    nf4, integers = (output_bytes(make_run(model, text, bits=4, group_size=32, grid=grid)) for grid in ("nf4", "int"))
    weights = 3 * 64 * 128 + 2 * 64 * 64 + 2 * 32 * 64
    assert nf4 - integers == 6 * weights // 32 * 2


def test_boundary_traffic_is_counted_between_windows(model, text):
    run = make_run(model, text)
    assert plan(run, blocks_per_stage=2).traffic()["boundaries written and read"] == 2 * 8 * 32 * 64 * 4
    assert plan(run, blocks_per_stage=4).traffic()["source read"] == run.checkpoint.total_bytes


def test_fingerprint_depends_on_contents_and_not_on_places(model, text, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for file in model.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    original = make_run(model, text)
    assert make_run(elsewhere, copy).fingerprint == original.fingerprint
    copy.write_bytes(text.read_bytes()[5:])
    assert make_run(elsewhere, copy).fingerprint != original.fingerprint
    other = build("llama", tmp_path / "other", num_hidden_layers=6, initializer_range=0.2)
    assert make_run(other, text).fingerprint != original.fingerprint


def test_tuning_is_planned_for(model, text):
    plain, tuned = (plan(make_run(model, text, seq_len=256, tune_steps=steps)) for steps in (0, 5))
    run = tuned.run
    states = run.token_ids.size * run.checkpoint.config.hidden_size * 4
    assert plain.scratch_bytes() == 0
    assert tuned.scratch_bytes() == 5 * states  # before each of four blocks and after the last
    assert "scratch" not in plain.describe()
    assert "of local disk per worker" in tuned.describe()
    assert tuned.holding.host_bytes > plain.holding.host_bytes
