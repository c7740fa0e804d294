"""Moments kept in storage: the same bytes with them as without, and no forward passes where they are there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from srr_dist.calibration import InputMoment
from srr_dist.config import QuantizeConfig, RunConfig
from srr_dist.pipeline.driver import blocks_at_rest, quantize
from srr_dist.pipeline.prepare import make_run, open_sources
from srr_dist.pipeline.run import Run
from srr_dist.pipeline.stage import Stage
from srr_dist.pipeline.stage_plan import StagePlan
from srr_dist.pipeline.statistics import Statistics
from srr_dist.store import ObjectStore, RunArea
from tests.conftest import Job
from tests.families import build

NAME = "model.layers.0.mlp.up_proj"


def a_run(model: Path, text: Path, statistics: Path, **changes: Any) -> Run:
    options: dict[str, Any] = {"rank": 4, "num_samples": 4, "seq_len": 24, "dtype": "float32"}
    config = QuantizeConfig(model=str(model), calibration=str(text), **(options | changes))
    return make_run(open_sources(config), "", on_gpu=False, statistics=str(statistics))


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("one-block"), num_hidden_layers=1)


def summed(scaling: str, features: int = 37) -> InputMoment:
    moment = InputMoment(features, scaling)
    for seed in range(3):
        x = torch.randn(20, features, generator=torch.Generator().manual_seed(seed))
        x[0, 3] = torch.inf
        moment.update(x)
    moment.update(torch.ones(4, features), first=8)
    return moment


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("scaling", ["exact", "diag", "lqer", "identity"])
@pytest.mark.parametrize("features", [1, 3, 37])
def test_moment_comes_back_to_the_bit_with_its_counts(one_block, text, tmp_path, scaling, features):
    run = a_run(one_block, text, tmp_path / "kept", scaling=scaling)
    moment, found = summed(scaling, max(features, 4)), InputMoment(max(features, 4), scaling)
    Statistics(run).save(NAME, moment, tmp_path)
    assert Statistics(run).load(NAME, found)
    assert torch.equal(found.value(), moment.value())
    assert (found.tokens, found.excluded, found.weight) == (61, 3, 68)
    assert Statistics(run).available() == {NAME}
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []


def test_symmetric_moment_takes_five_eighths_of_its_matrix(one_block, text, tmp_path):
    Statistics(a_run(one_block, text, tmp_path / "kept")).save(NAME, summed("exact", 256), tmp_path)
    (file,) = files(tmp_path / "kept")
    assert 8 * 256 * 256 * 5 / 8 < file.stat().st_size < 8 * 256 * 256 * 0.64


def test_moment_of_zeros_that_no_row_was_added_to_comes_back(one_block, text, tmp_path):
    run = a_run(one_block, text, tmp_path / "kept")
    Statistics(run).save(NAME, InputMoment(8, "exact"), tmp_path)
    found = InputMoment(8, "exact")
    assert Statistics(run).load(NAME, found)
    assert (found.tokens, found.value().count_nonzero()) == (0, 0)


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


DAMAGES = {
    "flipped bit": flip,
    "truncated": lambda content: content[:-8],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "other header": lambda content: content.replace(b'"excluded":"3"', b'"excluded":"0"'),
    "no safetensors": lambda content: b"\xff" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_object_is_removed_and_not_used(one_block, text, tmp_path, damage):
    statistics = Statistics(a_run(one_block, text, tmp_path / "kept"))
    statistics.save(NAME, summed("exact"), tmp_path)
    (file,) = files(tmp_path / "kept")
    file.write_bytes(damage(file.read_bytes()))
    assert not statistics.load(NAME, InputMoment(37, "exact"))
    assert files(tmp_path / "kept") == []
    assert statistics.available() == set()


def test_sound_object_beside_a_damaged_one_is_used(one_block, text, tmp_path):
    statistics = Statistics(a_run(one_block, text, tmp_path / "kept"))
    statistics.save(NAME, summed("exact"), tmp_path)
    (file,) = files(tmp_path / "kept")
    bad = file.with_name("0" * 64 + ".safetensors")
    bad.write_bytes(flip(file.read_bytes()))
    found = InputMoment(37, "exact")
    assert statistics.load(NAME, found)
    assert torch.equal(found.value(), summed("exact").value())
    assert files(tmp_path / "kept") == [file]


def test_object_of_another_width_is_not_used(one_block, text, tmp_path):
    statistics = Statistics(a_run(one_block, text, tmp_path / "kept"))
    statistics.save(NAME, summed("exact", 16), tmp_path)
    assert not statistics.load(NAME, InputMoment(37, "exact"))


def test_what_changes_moments_changes_their_place_and_nothing_else_does(one_block, text, tmp_path):
    place = Statistics(a_run(one_block, text, tmp_path)).fingerprint
    same: list[dict[str, Any]] = [
        {"bits": 4}, {"rank": 8}, {"grid": "int"}, {"group_size": 16}, {"split": "energy"}, {"form": "split"},
        {"method": "qer"}, {"include": "mlp"}, {"exclude": "q_proj"}, {"max_bad_rows": 0.5},
    ]  # fmt: skip
    other: list[dict[str, Any]] = [
        {"scaling": "diag"}, {"num_samples": 3}, {"seq_len": 23}, {"seed": 1}, {"dtype": "bfloat16"},
    ]  # fmt: skip
    assert {Statistics(a_run(one_block, text, tmp_path, **change)).fingerprint for change in same} == {place}
    places = {Statistics(a_run(one_block, text, tmp_path, **change)).fingerprint for change in other} | {place}
    assert len(places) == len(other) + 1
    moved = shutil.copytree(one_block, tmp_path / "moved")
    assert Statistics(a_run(moved, text, tmp_path)).fingerprint == place
    changed = build("llama", tmp_path / "changed", num_hidden_layers=1, initializer_range=0.2)
    assert Statistics(a_run(changed, text, tmp_path)).fingerprint not in places


def test_block_is_at_rest_once_the_moments_of_all_its_selected_inputs_are_kept(one_block, text, tmp_path):
    whole, attention = (a_run(one_block, text, tmp_path / "kept", include=include) for include in ("", "self_attn"))
    inputs = {linear.input for linear in whole.graph.blocks[0].linears}
    assert blocks_at_rest(whole) == blocks_at_rest(attention) == set()
    for name in sorted(inputs, key=lambda name: "mlp" in name):
        assert blocks_at_rest(whole) == set()
        Statistics(whole).save(name, summed("exact"), tmp_path)
    assert blocks_at_rest(whole) == blocks_at_rest(attention) == {0}
    assert blocks_at_rest(replace(whole, statistics="")) == set()


def solved(run: Run, *, passes: bool) -> dict[str, Any]:
    """A model of one block through a stage: what it committed, without what differs from time to time."""
    stage = Stage(run, "host", threads=1)
    start = 0 if passes else None
    stage.open(StagePlan(0, 0, (0,), frozenset({0}), start, save=None, last=True, planned_memory={}, passes=passes))
    if passes:
        stage.forward(range(len(run.token_ids)), None)
    stage.end_forward()
    stage.solve(0, 1)
    stage.commit("00000")
    record = stage.area.records()["00000"]
    files = {kind: entry.sha256 for kind, entry in record.files.items()}
    layers = [{key: value for key, value in layer.items() if key != "seconds"} for layer in record.layers]
    return {"files": files, "layers": layers, "calibrated": record.seconds["calibrate"] > 0}


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize("scaling", ["exact", "diag", "lqer"])
def test_another_recipe_takes_the_moments_of_the_first_and_commits_the_same(one_block, text, tmp_path, scaling):
    def other(output: str, statistics: str) -> Run:
        recipe = {"bits": 4, "split": "criterion", "exclude": "q_proj"}
        run = a_run(one_block, text, tmp_path / statistics, scaling=scaling, **recipe)
        return replace(run, output=str(tmp_path / output))

    first = a_run(one_block, text, tmp_path / "kept", scaling=scaling)
    assert solved(replace(first, output=str(tmp_path / "first")), passes=True)["calibrated"]
    alone, shared = solved(other("alone", "none"), passes=True), solved(other("shared", "kept"), passes=False)
    assert alone.pop("calibrated")
    assert not shared.pop("calibrated")
    assert alone == shared
    assert {layer["tokens"] for layer in shared["layers"]} == {4 * 24}


@pytest.fixture(scope="module")
def kept(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The output of the tests' run with the moments that it kept beside it; not to be changed."""
    folder = tmp_path_factory.mktemp("kept")
    run_here(job, folder / "out", statistics=str(folder / "statistics"), workers=2, blocks_per_stage=1)
    return folder


def run_here(job: Job, output: Path, **changes: Any) -> None:
    options = {
        "model": str(job.model),
        "calibration": str(job.text),
        "output": str(output),
        "num_samples": 8,
        "seq_len": 32,
        "rank": 4,
        "host_memory": "4GiB",
        "ray_address": job.cluster.address,
    }
    quantize(RunConfig.from_options(options | changes))


def manifest(output: Path) -> bytes:
    return (output / "manifest.json").read_bytes()


def calibrated(output: Path) -> list[int]:
    """Blocks that sequences passed through."""
    store = ObjectStore(str(output))
    records = RunArea(store, RunArea.find(store)[0]).records()
    return [int(unit) for unit, record in records.items() if record.seconds.get("calibrate")]


@pytest.mark.slow
def test_run_that_keeps_moments_gives_the_bytes_of_one_that_does_not(finished, kept):
    assert manifest(kept / "out") == manifest(finished)
    assert calibrated(kept / "out") == [0, 1, 2, 3, 4, 5]
    assert len(files(kept / "statistics")) == 6 * 4


@pytest.mark.slow
def test_blocks_whose_moments_are_missing_or_damaged_alone_are_calibrated(job, finished, kept, tmp_path):
    statistics = Path(shutil.copytree(kept / "statistics", tmp_path / "statistics"))
    (missing,) = statistics.glob("*/model.layers.1.mlp.down_proj/*")
    missing.unlink()
    for block in (0, 2, 3, 5):
        (damaged,) = statistics.glob(f"*/model.layers.{block}.self_attn.q_proj/*")
        damaged.write_bytes(flip(damaged.read_bytes()))
    run_here(job, tmp_path / "out", statistics=str(statistics), workers=2)
    assert manifest(tmp_path / "out") == manifest(finished)
    assert calibrated(tmp_path / "out") == [0, 1, 2, 3, 5]
    assert [path.read_bytes() for path in files(statistics)] == [
        path.read_bytes() for path in files(kept / "statistics")
    ]
