"""Bits spent where they take most off the loss: by what gradients held out say of each layer, and once for good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from srr_dist.calibration.sketches import HeldOut
from srr_dist.checkpoint.graph import Linear
from srr_dist.config import BITS, QuantizeConfig
from srr_dist.errors import CalibrationError, StoreError
from srr_dist.export.verify import verify_output
from srr_dist.pipeline.gradients import recall
from srr_dist.pipeline.prepare import make_run, open_sources
from srr_dist.pipeline.run import Run
from srr_dist.pipeline.stage import Stage
from srr_dist.pipeline.stage_plan import stage_plans
from srr_dist.pipeline.statistics import Statistics
from srr_dist.pipeline.widths import WIDTHS, spend, weigh, widths_of
from srr_dist.pipeline.windows import next_window_at_rest
from srr_dist.pipeline.work import WindowWork
from srr_dist.solve import allocate, make_grid, width_errors
from srr_dist.store import ObjectStore, RunArea, read_complete
from tests.conftest import Job
from tests.families import build
from tests.pipeline.test_gradients import BLOCKS, kept_files, run_here, walked, windows

pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS)


def a_run(model: Path, text: Path, folder: Path, **changes: Any) -> Run:
    options = {"num_samples": 40, "seq_len": 24, "sketch": "B", "rank": 4, "dtype": "float32", "mean_bits": 3.5}
    sources = open_sources(QuantizeConfig(model=str(model), calibration=str(text), **(options | changes)))
    return make_run(sources, str(folder / "out"), on_gpu=False, statistics=str(folder / "statistics"))


def weighed(run: Run, blocks_per_stage: int) -> RunArea:
    """Where the run's widths are written down, once its layers are weighed as the driver has its stages do it."""
    area, stage = area_of(run), Stage(run, "host", threads=1)
    area.begin(run.document())
    while missing := spend(run, area):
        (plan,) = stage_plans(next_window_at_rest(missing, 1, blocks_per_stage, then="weigh"), 0, {})
        stage.open(plan)
        stage.end_forward()
        stage.weigh()
    return area


def area_of(run: Run) -> RunArea:
    return RunArea(ObjectStore(run.output), run.fingerprint)


@pytest.fixture(scope="module")
def run(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose sketches and curves are kept; not to be changed."""
    found = walked(a_run(model, text, tmp_path_factory.mktemp("run")), 1, 1)
    weighed(found, 2)
    torch.set_grad_enabled(True)
    return found


def layers(run: Run) -> list[Linear]:
    return [linear for block in run.graph.blocks for linear in block.linears]


def mean(run: Run, widths: dict[str, int]) -> float:
    sizes = {linear.name: linear.out_features * linear.in_features for linear in layers(run)}
    return sum(sizes[name] * bits for name, bits in widths.items()) / sum(sizes.values())


def test_bits_are_spent_within_the_mean_and_shared_by_layers_of_one_input(run):
    widths = widths_of(run, area_of(run))
    assert widths.keys() == run.quantized
    assert 3.2 < mean(run, widths) <= 3.5
    assert len(set(widths.values())) > 1
    for linear in layers(run):
        assert widths[linear.name] == widths[linear.input]


def test_bits_are_those_that_the_layers_gradients_ask_for(run):
    errors = {}
    for linear in layers(run):
        W, kept = run.checkpoint.read([f"{linear.name}.weight"])[f"{linear.name}.weight"], recall(run, linear)
        assert kept is not None
        errors[linear.name] = width_errors(W, {b: make_grid("int", b, 64) for b in BITS}, "search", kept.held_out)
    sizes = {linear.name: linear.out_features * linear.in_features for linear in layers(run)}
    leaders = {linear.name: linear.input for linear in layers(run)}
    assert widths_of(run, area_of(run)) == allocate(errors, sizes, 3.5, leaders)


def test_layers_of_one_input_have_widths_of_their_own_where_that_is_asked_for(run, model, text):
    alone = a_run(model, text, Path(run.statistics).parent, own_widths=True)
    assert alone.fingerprint != run.fingerprint
    assert spend(alone, area_of(alone)) == set()
    widths = widths_of(alone, area_of(alone))
    assert any(widths[linear.name] != widths[linear.input] for linear in layers(alone))
    assert mean(alone, widths) <= 3.5


def test_widths_are_chosen_among_those_that_are_asked_for(run, model, text):
    few = a_run(model, text, Path(run.statistics).parent, among="4 8", mean_bits=5.0)
    assert few.fingerprint != run.fingerprint
    assert spend(few, area_of(few)) == set()
    widths = widths_of(few, area_of(few))
    assert set(widths.values()) == {4, 8}
    assert 4.5 < mean(few, widths) <= 5.0
    area_of(few).store.put(area_of(few).path(WIDTHS), json.dumps(dict.fromkeys(widths, 3)).encode())
    with pytest.raises(StoreError, match=r"widths\.json: expected 4, 8 bits for each of 21 layers"):
        widths_of(few, area_of(few))


def test_curves_serve_every_mean_and_rank_but_no_other_codes_or_layers(run, model, text):
    folder = Path(run.statistics).parent
    for change, missing in (
        ({"mean_bits": 2.5, "rank": 8}, set()),
        ({"mean_bits": 0.0}, set()),
        ({"group_size": 32}, {0, 1, 2}),
        ({"grid": "mxint"}, {0, 1, 2}),
        ({"scales": "absmax"}, {0, 1, 2}),
        ({"exclude": r"1\.mlp\.up_proj"}, {1}),
    ):
        other = a_run(model, text, folder, **change)
        assert spend(other, area_of(other)) == missing
        assert area_of(other).store.exists(area_of(other).path(WIDTHS)) == (change.get("mean_bits") == 2.5)


def test_widths_do_not_depend_on_windows_and_outlast_the_statistics(run, model, text, tmp_path):
    other = walked(a_run(model, text, tmp_path), 1, 2)
    area = weighed(other, 1)
    torch.set_grad_enabled(True)
    assert widths_of(other, area) == widths_of(run, area_of(run))
    for file in Path(other.statistics).rglob("*.safetensors"):
        file.unlink()
    assert spend(other, area) == set()
    assert widths_of(other, area) == widths_of(run, area_of(run))


def test_damaged_curves_are_weighed_again(run, model, text, tmp_path):
    shutil.copytree(run.statistics, tmp_path / "statistics")
    again = a_run(model, text, tmp_path)
    (file,) = (tmp_path / "statistics").glob("*/model.layers.2.widths-*/*")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert spend(again, area_of(again)) == {2}
    area = weighed(again, 1)
    torch.set_grad_enabled(True)
    assert widths_of(again, area) == widths_of(run, area_of(run))


def test_gradients_that_are_gone_or_not_finite_are_named(run, model, text, tmp_path):
    other = a_run(model, text, tmp_path)
    block = other.graph.blocks[1]
    weights, name = other.checkpoint.read(block.tensors), block.linears[0].name
    with pytest.raises(StoreError, match=rf"layer {name}: its held-out gradients are not kept any more"):
        weigh(other, block, weights, torch.device("cpu"), tmp_path)
    held_out = HeldOut()
    held_out.keep(
        torch.full((24, block.linears[0].in_features), torch.inf), torch.ones(24, len(weights[f"{name}.weight"]))
    )
    Statistics(other, "B").save_held_out(f"{name}.held-out", held_out, tmp_path)
    with pytest.raises(CalibrationError, match=rf"layer {name}: the gradients of all 1 sequences .* NaN or Inf"):
        weigh(other, block, weights, torch.device("cpu"), tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"model.layers.0.mlp.up_proj":3}'])
def test_written_widths_that_are_not_this_runs_are_refused(model, text, tmp_path, content):
    other = a_run(model, text, tmp_path)
    area = area_of(other)
    area.store.put(area.path(WIDTHS), content)
    with pytest.raises(
        StoreError, match=r"widths\.json: expected 2, 3, 4, 5, 6, 7, 8 bits for each of 21 layers; remove it"
    ):
        widths_of(other, area)


ASKED = {"mean_bits": 3.5, "own_widths": True, "blocks_per_stage": 2, "workers": 1}


@pytest.fixture(scope="module")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that had bits to spend, and what it kept; not to be changed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_here(job, folder, **ASKED)
    return folder


def bits_of_layers(folder: Path) -> dict[str, int]:
    return {name: layer["bits"] for name, layer in read_complete(ObjectStore(str(folder / "out"))).layers.items()}


@pytest.mark.slow
def test_layers_are_solved_packed_and_described_with_the_bits_that_they_were_given(undisturbed):
    area = RunArea(ObjectStore(str(undisturbed / "out")), RunArea.find(ObjectStore(str(undisturbed / "out")))[0])
    bits = bits_of_layers(undisturbed)
    assert bits == json.loads(area.store.get(area.path(WIDTHS)))
    assert len(set(bits.values())) > 1
    assert verify_output(area.store.url) == []
    totals = area.store.get_json("report.json")["totals"]
    assert 3.2 < totals["bits_codes"] <= 3.5


@pytest.mark.slow
def test_run_that_is_cut_off_while_layers_are_weighed_goes_on_and_ends_with_the_same(
    job, undisturbed, tmp_path, monkeypatch
):
    worked = windows(undisturbed)
    assert worked[-6:] == ["blocks 0–1", "blocks 2–3", "blocks 4–5"] * 2  # weighed, then solved
    on_all, done = WindowWork._on_all, list[str]()

    def die(work: WindowWork, method: str, doing: str) -> Any:
        failures = on_all(work, method, doing)
        if method == "weigh":
            done.append(work.name)
        if done == ["blocks 0–1", "blocks 2–3"]:
            raise KeyboardInterrupt
        return failures

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WindowWork, "_on_all", die)
        run_here(job, tmp_path, **ASKED)
    before = len(windows(tmp_path))
    again = run_here(job, tmp_path, **ASKED | {"workers": 2, "blocks_per_stage": 1})
    assert again[before:] == ["blocks 4–5", "blocks 0–1", "blocks 2–3", "blocks 4–5"]
    for name in ("manifest.json", "COMMIT"):
        assert (tmp_path / "out" / name).read_bytes() == (undisturbed / "out" / name).read_bytes()
    assert kept_files(tmp_path) == kept_files(undisturbed)


@pytest.mark.slow
def test_worker_that_dies_while_it_weighs_costs_its_window_and_another_mean_finds_curves_kept(
    job, undisturbed, tmp_path, monkeypatch
):
    shutil.copytree(undisturbed / "statistics", tmp_path / "statistics")
    for file in tmp_path.glob("statistics/*/*.widths-*/*"):
        file.unlink()
    on_all, killed = WindowWork._on_all, list[str]()

    def die(work: WindowWork, method: str, doing: str) -> Any:
        if method == "weigh" and not killed and work.name == "blocks 2–3":
            killed.append(work.name)
            work._stages[0][0].kill()
        return on_all(work, method, doing)

    monkeypatch.setattr(WindowWork, "_on_all", die)
    assert run_here(job, tmp_path, **ASKED) == ["blocks 0–1", *killed, *windows(undisturbed)[-5:]]
    assert (tmp_path / "out/COMMIT").read_bytes() == (undisturbed / "out/COMMIT").read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert run_here(job, tmp_path, **ASKED | {"mean_bits": 2.5, "rounding": "yaqa"}) == windows(undisturbed)[-3:]
    fewer, more = bits_of_layers(tmp_path), bits_of_layers(undisturbed)
    assert all(fewer[name] <= more[name] for name in more) and fewer != more
