"""The way back over the windows: sketches of the whole model's gradients, whatever the workers and interruptions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from srr_dist.calibration.head import sample
from srr_dist.calibration.sketches import HeldOut, Sketch, sketch_passes
from srr_dist.config import QuantizeConfig, RunConfig
from srr_dist.errors import StoreError
from srr_dist.pipeline import driver, prepare
from srr_dist.pipeline.boundaries import Boundaries, crossings
from srr_dist.pipeline.driver import blocks_at_rest, quantize
from srr_dist.pipeline.failures import UnitError
from srr_dist.pipeline.gradients import recall, unsketched
from srr_dist.pipeline.prepare import make_run, open_sources
from srr_dist.pipeline.run import Run
from srr_dist.pipeline.stage import Stage
from srr_dist.pipeline.stage_plan import stage_plans
from srr_dist.pipeline.statistics import Statistics
from srr_dist.pipeline.windows import Window, next_window_back
from srr_dist.pipeline.work import WindowWork
from srr_dist.seeds import layer_seed
from srr_dist.store import ObjectStore, RunArea
from srr_dist.store.events import read_events
from tests.conftest import Job
from tests.families import build
from tests.solve.problems import second_order

SAMPLES, LENGTH, BLOCKS = 5, 24, 3
DOWN = "model.layers.1.mlp.down_proj"


pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS)


def a_run(model: Path, text: Path, folder: Path, **changes: Any) -> Run:
    options = {"num_samples": SAMPLES, "seq_len": LENGTH, "sketch": "B", "rank": 4, "dtype": "float32"} | changes
    sources = open_sources(QuantizeConfig(model=str(model), calibration=str(text), **options))
    return make_run(sources, str(folder / "out"), on_gpu=False, statistics=str(folder / "statistics"))


def work_off(stages: list[Stage], window: Window) -> None:
    """One window, as the driver has its stages do it."""
    run, plans = stages[0].run, stage_plans(window, 0, {})
    active = stages[: len(plans)]
    for stage, plan in zip(active, plans, strict=True):
        stage.open(plan)
    stream(run, [stage.forward for stage in active])
    for stage in active:
        stage.end_forward()
    for _ in range(sketch_passes(run.config.sketch) if window.then == "back" else 0):
        stream(run, [stage.backward for stage in active[::-1]])
        for stage in active:
            stage.end_backward()


def stream(run: Run, chain: list[Any]) -> None:
    for batch in (range(2), range(2, len(run.token_ids))):
        message = None
        for step in chain:
            message = step(batch, message)
        assert message is None


def places(run: Run) -> tuple[Boundaries, Boundaries]:
    return crossings(run, RunArea(ObjectStore(run.output), run.fingerprint))


def following_window(run: Run, *capacity: int) -> Window:
    to_calibrate = set(range(BLOCKS)) - blocks_at_rest(run)
    return next_window_back(unsketched(run), to_calibrate, *(kind.available() for kind in places(run)), *capacity)


def walked(run: Run, count: int, per_stage: int, threads: int = 1) -> Run:
    """The run, once all its sketches are kept."""
    stages = [Stage(run, "host", threads) for _ in range(count)]
    while unsketched(run):
        work_off(stages, following_window(run, count, per_stage))
    return run


def sketches(run: Run) -> set[str]:
    """Everything kept of a run's sketches; names hold the sha256 of what they name."""
    store = ObjectStore(run.statistics)
    return set(store.list(Statistics(run, run.config.sketch).fingerprint))


@torch.enable_grad()
def by_the_whole_model(model: Path, run: Run) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Layer -> its inputs and output gradients of each sequence, by plain autograd on all of the model."""
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def listen(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda g: found.setdefault(name, []).append((args[0].detach()[0], g[0])))

        return hook

    for name, module in whole.named_modules():
        if name in run.quantized:
            module.register_forward_hook(listen(name))
    for index, ids in enumerate(torch.from_numpy(run.token_ids)):
        scores = whole(ids.unsqueeze(0), use_cache=False).logits[0]
        generator = torch.Generator().manual_seed(layer_seed(run.config.seed, f"labels of sequence {index}"))
        labels = sample(scores.detach().softmax(-1), torch.rand(LENGTH, dtype=torch.float64, generator=generator))
        nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
    return found


@pytest.mark.parametrize(
    ("kind", "band"), [("B", 0), ("A:1", 0), ("full", 0), ("diag", 0), ("scalar", 0), ("B", 16), ("A:1", 16)]
)
def test_sketches_kept_are_those_of_the_whole_models_gradients(model, text, tmp_path, kind, band):
    run = walked(a_run(model, text, tmp_path, sketch=kind, sketch_band=band), 1, 2)
    data = by_the_whole_model(model, run)
    assert data.keys() == run.quantized
    for linear in (linear for block in run.graph.blocks for linear in block.linears):
        found, expected = recall(run, linear), Sketch(kind, linear.out_features, linear.in_features, band=band)
        assert found is not None
        *seen, unseen = data[linear.name]  # an eighth is held out, or one
        for _ in range(sketch_passes(kind)):
            for x, g in seen:
                expected.update(x, g)
            expected.turn()
        assert found.sketch.value().keys() == expected.value().keys()
        for side, factor in expected.value().items():
            assert float((found.sketch.value()[side] - factor).norm() / factor.norm()) < 1e-4, (linear.name, side)
            assert found.sketch.sides[side].tokens == expected.sides[side].tokens
        held = HeldOut()
        held.keep(*unseen)
        error = torch.randn(linear.out_features, linear.in_features, generator=torch.Generator().manual_seed(0))
        assert second_order(error, found.held_out) == pytest.approx(second_order(error, held), rel=0.05)


@pytest.fixture(scope="module")
def kept(model, text, tmp_path_factory) -> Run:
    """A run whose sketches are kept, made by one worker one block at a time; not to be changed."""
    run = walked(a_run(model, text, tmp_path_factory.mktemp("kept")), 1, 1)
    torch.set_grad_enabled(True)
    return run


@pytest.mark.parametrize("capacity", [(1, 3), (2, 1), (3, 1), (1, 2)], ids=str)
def test_sketches_do_not_depend_on_workers_windows_or_threads(model, text, tmp_path, kept, capacity):
    run = walked(a_run(model, text, tmp_path), *capacity, threads=2)
    assert sketches(run) == sketches(kept)
    assert len(sketches(run)) == BLOCKS * 7 * 4  # three sides, and what is held out


def test_sketches_are_those_of_any_recipe_and_of_no_other_seed_or_kind(model, text, kept):
    folder = Path(kept.statistics).parent
    assert not unsketched(kept)
    for same in (
        {"bits": 2},
        {"rank": 8},
        {"grid": "mxint", "group_size": 32},
        {"include": "mlp"},
        {"scaling": "diag"},
    ):
        assert not unsketched(a_run(model, text, folder, **same))
    for other in (
        {"seed": 1},
        {"sketch": "diag"},
        {"sketch": "A:1"},
        {"sketch_band": 16},
        {"num_samples": 4},
        {"dtype": "bfloat16"},
    ):
        assert unsketched(a_run(model, text, folder, **other)) == {0, 1, 2}
    assert unsketched(a_run(model, text, folder, sketch="")) == set()


def test_passes_forward_keep_the_moments_of_the_blocks_they_reach(kept):
    assert blocks_at_rest(kept) == {0, 1}  # before the last block the walk turns round


@pytest.mark.parametrize("part", ["output", "input", "held-out"])
def test_damaged_part_is_not_used_and_its_block_alone_is_sketched_again(model, text, tmp_path, kept, part):
    shutil.copytree(kept.statistics, tmp_path / "statistics")
    run = a_run(model, text, tmp_path)
    linear = next(linear for linear in run.graph.blocks[1].linears if linear.name == DOWN)
    (file,) = (tmp_path / "statistics").glob(f"*/{DOWN}.{part}/*")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert recall(run, linear) is None
    assert unsketched(run) == {1}
    walked(run, 1, 1)
    assert sketches(run) == sketches(kept)
    assert places(run)[1].available() == {2, 3}  # the way back ended where nothing is missing


def test_kill_before_sketches_are_kept_costs_one_window(model, text, tmp_path, kept, monkeypatch):
    run = a_run(model, text, tmp_path)
    stages = [Stage(run, "host", threads=1)]
    while (window := following_window(run, 1, 1)).then == "nothing":
        work_off(stages, window)
    work_off(stages, window)
    window, save = following_window(run, 1, 1), Statistics.save

    def die(self: Statistics, name: str, *arguments: Any) -> None:
        if name == "model.layers.1.mlp.up_proj.output":
            raise KeyboardInterrupt
        save(self, name, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Statistics, "save", die)
        work_off(stages, window)
    assert following_window(run, 1, 1) == window
    assert (window.then, window.blocks) == ("back", [1])
    walked(run, 1, 1)
    assert sketches(run) == sketches(kept)


def test_damaged_gradients_are_refused_and_come_from_the_head_again(model, text, tmp_path, kept):
    run = a_run(model, text, tmp_path)
    stages = [Stage(run, "host", threads=1)]
    while unsketched(run) != {0, 1}:
        work_off(stages, following_window(run, 1, 1))
    places(run)[1].discard(BLOCKS)  # what the driver does
    (damaged,) = Path(run.output).rglob("gradients/00002/00003.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=r"gradients/00002/00003\.safetensors: missing or damaged"):
        work_off(stages, following_window(run, 1, 1))
    window = following_window(run, 1, 1)
    assert (window.blocks, window.collect, window.save) == ([2], set(), 2)
    walked(run, 1, 1)
    assert sketches(run) == sketches(kept)


def test_sketch_of_few_sequences_is_warned_of_before_anything_starts(model, text, tmp_path, caplog, monkeypatch):
    a_run(model, text, tmp_path)
    assert f"num_samples: a sketch of {SAMPLES} sequences is noisy" in caplog.text
    caplog.clear()
    a_run(model, text, tmp_path, sketch="")
    monkeypatch.setattr(prepare, "FEW_SEQUENCES", SAMPLES)
    a_run(model, text, tmp_path)
    assert "noisy" not in caplog.text


def test_layer_that_fails_on_the_way_back_names_its_block(model, text, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("no such product")

    run = a_run(model, text, tmp_path)
    monkeypatch.setattr(Sketch, "update", fail)
    with pytest.raises(UnitError, match="no such product") as caught:
        walked(run, 1, 3)
    assert caught.value.unit == "00002"


def run_here(job: Job, folder: Path, **changes: Any) -> list[str]:
    """A whole run on the cluster; returns the windows it worked on."""
    options = {
        "model": str(job.model), "calibration": str(job.text), "output": str(folder / "out"), "num_samples": 8,
        "seq_len": 32, "rank": 4, "host_memory": "4GiB", "ray_address": job.cluster.address, "sketch": "B",
        "statistics": str(folder / "statistics"), "split": "criterion", "iterations": 0, "descent": 0,
    }  # fmt: skip
    quantize(RunConfig.from_options(options | changes))
    return windows(folder)


def windows(folder: Path) -> list[str]:
    store = ObjectStore(str(folder / "out"))
    events = read_events(RunArea(store, RunArea.find(store)[0]), parts=10**6)
    return [event["work"] for event in events if event["event"] == "window"]


def kept_files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.glob("statistics/*/*/*")}


@pytest.fixture(scope="module")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run with sketches, and what it kept; not to be changed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_here(job, folder, workers=1, blocks_per_stage=2)
    return folder


@pytest.mark.slow
def test_run_that_is_cut_off_on_its_way_back_goes_on_and_keeps_the_same(job, undisturbed, tmp_path, monkeypatch):
    worked = windows(undisturbed)
    assert worked == [f"blocks {name}" for name in ("0–1", "2–3", "4–5", "2–3", "0–1", "0–1", "2–3", "4–5")]
    discard = driver._discard_used

    def die(window: Window, *arguments: Any) -> None:
        if window.then == "back" and window.start == 2:
            raise KeyboardInterrupt
        discard(window, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(driver, "_discard_used", die)
        run_here(job, tmp_path, workers=1, blocks_per_stage=2)
    before = len(windows(tmp_path))
    assert run_here(job, tmp_path, workers=2, blocks_per_stage=1)[before:] == worked[4:]
    for name in ("manifest.json", "COMMIT"):
        assert (tmp_path / "out" / name).read_bytes() == (undisturbed / "out" / name).read_bytes()
    assert kept_files(tmp_path) == kept_files(undisturbed)
    (area,) = (tmp_path / "out/.srr").iterdir()
    assert not (area / "boundaries").exists() and not (area / "gradients").exists()


@pytest.mark.slow
def test_worker_that_dies_while_gradients_come_back_costs_its_window(job, undisturbed, tmp_path, monkeypatch):
    come_back, killed = WindowWork._sketch, list[str]()

    def die(work: WindowWork) -> Any:
        if not killed and work.name == "blocks 2–3":
            killed.append(work.name)
            work._stages[0][0].kill()
        return come_back(work)

    monkeypatch.setattr(WindowWork, "_sketch", die)
    worked, again = windows(undisturbed), run_here(job, tmp_path, workers=1, blocks_per_stage=2)
    assert again == [*worked[:4], *killed, *worked[4:]]
    assert kept_files(tmp_path) == kept_files(undisturbed)


@pytest.mark.slow
def test_recipe_with_other_bits_finds_moments_and_sketches_kept(job, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "statistics", tmp_path / "statistics")
    assert run_here(job, tmp_path, workers=2, blocks_per_stage=4, bits=4) == ["blocks 0–5"]
    assert kept_files(tmp_path) == kept_files(undisturbed)


@pytest.mark.slow
def test_rounding_against_the_output_takes_the_sketches_and_gives_the_same_for_any_workers(job, undisturbed, tmp_path):
    found = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        shutil.copytree(undisturbed / "statistics", folder / "statistics")
        assert run_here(job, folder, workers=workers, blocks_per_stage=4, rounding="yaqa")[-1].endswith("–5")
        found.append((folder / "out/manifest.json").read_bytes())
    assert found[0] == found[1] != (undisturbed / "out/manifest.json").read_bytes()
    area = RunArea(ObjectStore(str(folder / "out")), RunArea.find(ObjectStore(str(folder / "out")))[0])
    layers = [layer for record in area.records().values() for layer in record.layers]
    assert {layer["gate"]["chosen"] for layer in layers} <= {"one-sided", "two-sided"}
    assert all(layer["gate"]["second_order"]["two-sided"] > 0 for layer in layers)
