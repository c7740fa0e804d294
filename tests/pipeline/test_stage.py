"""A stage as a plain object: what it sums, what it commits, what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from srr_dist.calibration import InputMoment
from srr_dist.checkpoint.source import Checkpoint
from srr_dist.config import QuantizeConfig
from srr_dist.errors import CalibrationError, CheckpointError
from srr_dist.export.adapter import lora_names
from srr_dist.export.base import PACKED, SCALE, SHAPE
from srr_dist.pipeline import prepare
from srr_dist.pipeline.failures import UnitError
from srr_dist.pipeline.memory import layers_at_once
from srr_dist.pipeline.run import Run, unit_name
from srr_dist.pipeline.solving import BlockSolver
from srr_dist.pipeline.stage import Stage
from srr_dist.pipeline.stage_plan import StagePlan
from srr_dist.solve import Metric, solve_layer
from srr_dist.store import BlockRecord
from srr_dist.store.records import REST
from tests.families import build

SAMPLES, LENGTH = 4, 24


pytestmark = pytest.mark.usefixtures("torch_settings")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=3)


def make_run(model: Path, text: Path, output: Path, **changes) -> Run:
    options = {"rank": 4, "num_samples": SAMPLES, "seq_len": LENGTH, "split": "criterion"} | changes
    config = QuantizeConfig(model=str(model), calibration=str(text), **options)
    return prepare.make_run(prepare.open_sources(config), str(output), on_gpu=False)


def one_stage(blocks: tuple[int, ...] = (0, 1, 2), **changes) -> StagePlan:
    whole = StagePlan(0, 0, blocks, frozenset(blocks), start=0, save=None, last=True, planned_memory={"host": 1})
    return replace(whole, **changes)


def calibrated(run: Run, plan: StagePlan | None = None, placement: str = "host") -> Stage:
    """A stage through which every sequence has passed."""
    stage = Stage(run, placement, threads=1)
    stage.open(plan or one_stage())
    for sequence in range(len(run.token_ids)):
        assert stage.forward((sequence,), None) is None
    stage.end_forward()
    return stage


def commit(stage: Stage, index: int, generation: int = 1) -> dict[str, Any]:
    """Solve a block and wait until its result is durable."""
    assert stage.solve(index, generation)
    return stage.commit(unit_name(index))


def totals(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: moment.value() for held in stage.held.values() for name, moment in sorted(held.moments.items())}


def committed(run: Run, stage: Stage, unit: str, kind: str) -> dict[str, torch.Tensor]:
    record = stage.area.records()[unit]
    return safetensors.torch.load(stage.area.store.get(record.files[kind].path))


def observed_inputs(model: Path, run: Run) -> dict[str, list[torch.Tensor]]:
    """Linear -> its input ``[T, n]`` for each sequence, seen by plain hooks on the whole model."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in original.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            seen = inputs.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0].clone()))
    with torch.no_grad():
        for row in torch.from_numpy(run.token_ids):
            original(row.unsqueeze(0), use_cache=False)
    return inputs


def test_moments_equal_those_of_hooks_on_the_whole_model(model, text, tmp_path):
    run = make_run(model, text, tmp_path / "out")
    found, inputs = totals(calibrated(run)), observed_inputs(model, run)
    expected_names = {linear.input for block in run.graph.blocks for linear in block.linears}
    assert set(found) == expected_names
    assert len(found) == 4 * 3  # q k v share one, gate up another
    for name, moment in found.items():
        exact = sum(x.double().mT @ x.double() for x in inputs[name]) / (SAMPLES * LENGTH)
        torch.testing.assert_close(moment, exact, rtol=1e-5, atol=1e-6)
        same = InputMoment(moment.shape[0], "exact")
        for x in inputs[name]:
            same.update(x)
        assert torch.equal(moment, same.value()), name


def test_layers_that_share_a_moment_see_the_same_input(model, text, tmp_path):
    run = make_run(model, text, tmp_path / "out")
    inputs = observed_inputs(model, run)
    for linear in (linear for block in run.graph.blocks for linear in block.linears):
        assert all(map(torch.equal, inputs[linear.name], inputs[linear.input])), linear.name


def test_two_stages_and_a_stored_boundary_give_the_same_moments_as_one(model, text, tmp_path):
    run = make_run(model, text, tmp_path / "out")
    expected = totals(calibrated(run))
    first, second = Stage(run, "host", 1), Stage(run, "host", 1)
    first.open(one_stage(blocks=(0,), last=False))
    second.open(StagePlan(1, 0, (1,), frozenset({1}), None, save=2, last=True, planned_memory={}))
    for sequences in ((0, 1, 2), (3,)):
        payload = first.forward(sequences, None)
        assert payload is not None
        assert payload.shape == (len(sequences), LENGTH, 64)
        assert second.forward(sequences, payload) is None
    first.end_forward()
    second.end_forward()
    found = totals(first) | totals(second)
    second.open(StagePlan(0, 1, (2,), frozenset({2}), start=2, save=None, last=True, planned_memory={}))
    second.forward((0, 1), None)
    second.forward((2, 3), None)
    second.end_forward()
    found |= totals(second)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_block_that_is_only_passed_through_keeps_no_moment_and_no_source(model, text, tmp_path):
    stage = calibrated(make_run(model, text, tmp_path / "out"), one_stage(collect=frozenset({2})))
    assert set(stage.held) == {2}
    assert {name.split(".")[2] for name in totals(stage)} == {"2"}


def test_committed_block_holds_the_solution_of_each_layer(model, text, tmp_path):
    run = make_run(model, text, tmp_path / "out")
    stage = calibrated(run)
    moments = totals(stage)
    summary = commit(stage, 1)
    base, adapter = committed(run, stage, "00001", "base"), committed(run, stage, "00001", "adapter")
    block, source = run.graph.blocks[1], run.checkpoint.read(run.graph.blocks[1].tensors)
    assert summary["unit"] == "00001"
    assert summary["layers"] == len(block.linears) == 7
    for linear in block.linears:
        weight = source.pop(f"{linear.name}.weight")
        metric = Metric.of(moments[linear.input], run.config.shrinkage)
        solution = solve_layer(weight, metric, linear.name, run.solve_options(run.grid))
        assert torch.equal(base.pop(linear.name + SHAPE), torch.tensor(weight.shape))
        assert torch.equal(base.pop(linear.name + SCALE), solution.scale)
        assert base.pop(linear.name + PACKED).dtype == torch.int32
        B, A = lora_names(linear.name)
        assert torch.equal(adapter.pop(B), solution.L)
        assert torch.equal(adapter.pop(A), solution.R)
    assert adapter == {}
    assert base.keys() == source.keys()  # norms and biases, as they were
    assert all(torch.equal(base[name], source[name]) for name in source)


def test_record_of_a_block_says_where_and_how_it_was_made(model, text, tmp_path):
    run = make_run(model, text, tmp_path / "out")
    stage = calibrated(run)
    commit(stage, 0, generation=3)
    record = stage.area.records()["00000"]
    assert isinstance(record, BlockRecord)
    assert (record.generation, record.fingerprint) == (3, run.fingerprint)
    assert set(record.seconds) == {"read", "calibrate", "solve", "write"}
    assert record.seconds["calibrate"] > 0
    assert record.stage["planned_memory"] == {"host": 1}
    assert record.stage["peak_memory"]["host"] > 2**20
    names = [linear.name for linear in run.graph.blocks[0].linears]
    assert sorted(layer["name"] for layer in record.layers) == sorted(names)
    assert {layer["type"] for layer in record.layers} == {name.removeprefix("model.layers.0.") for name in names}
    assert all(layer["tokens"] == SAMPLES * LENGTH and layer["excluded_rows"] == 0 for layer in record.layers)
    json.dumps(record.layers, allow_nan=False)


def test_next_block_is_solved_while_the_one_before_is_uploaded(model, text, tmp_path, monkeypatch):
    stage = calibrated(make_run(model, text, tmp_path / "out"))
    room, upload = Event(), stage.area.store.upload

    def slow(*arguments: Any) -> Any:
        assert room.wait(60)
        return upload(*arguments)

    monkeypatch.setattr(stage.area.store, "upload", slow)
    stage.solve(0, 1)
    held = BlockSolver.solve

    def solve(solver: BlockSolver, threads: int) -> Any:
        assert stage.area.records() == {}
        room.set()
        return held(solver, threads)

    monkeypatch.setattr(BlockSolver, "solve", solve)
    stage.solve(1, 1)
    assert [stage.commit(unit_name(index))["unit"] for index in (0, 1)] == ["00000", "00001"]
    assert set(stage.area.records()) == {"00000", "00001"}


def test_upload_that_fails_is_told_by_the_commit_and_names_the_unit(model, text, tmp_path, monkeypatch):
    stage = calibrated(make_run(model, text, tmp_path / "out"))

    def fail(*_: Any) -> Any:
        raise OSError("no room")

    monkeypatch.setattr(stage.area.store, "upload", fail)
    assert stage.solve(0, 1)
    assert stage.solve(1, 1)
    with pytest.raises(UnitError, match="no room") as caught:
        stage.commit("00001")
    assert caught.value.unit == "00001"
    assert stage.area.records() == {}


def test_weights_of_the_next_window_are_read_as_blocks_are_solved(model, text, tmp_path, monkeypatch):
    stage = calibrated(make_run(model, text, tmp_path / "out"), one_stage((0,), save=1, ahead=(2, 1)))
    assert stage.ahead == {}
    commit(stage, 0)
    read = stage.ahead[2].result()
    assert set(stage.ahead) == {2}  # as many as were solved

    def refuse(*_: Any) -> Any:
        raise AssertionError("it was read already")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    stage.open(one_stage((2,), start=1))
    assert stage.held[2].source is read
    assert stage.ahead == {}


def test_weights_read_for_a_window_that_does_not_come_are_let_go(model, text, tmp_path):
    stage = calibrated(make_run(model, text, tmp_path / "out"), one_stage((0,), save=1, ahead=(2,)))
    commit(stage, 0)
    stage.open(one_stage((1,), start=1))
    assert stage.ahead == {}
    assert set(stage.held) == {1}


def test_source_digest_depends_on_the_weights_alone(model, text, tmp_path):
    digests = []
    for i, changes in enumerate(({}, {"bits": 4})):
        stage = calibrated(make_run(model, text, tmp_path / str(i), **changes))
        commit(stage, 0)
        commit(stage, 1)
        digests.append([record.source_sha256 for record in stage.area.records().values()])
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[0][1]


def test_rest_is_committed_as_the_source_has_it(model, text, tmp_path):
    run = make_run(model, text, tmp_path / "out")
    stage = Stage(run, "host", 1)
    assert stage.store_rest(1)["layers"] == 0
    found, expected = committed(run, stage, REST, "base"), run.checkpoint.read(run.graph.rest)
    assert set(found) == set(expected) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "adapter" not in stage.area.records()[REST].files


@pytest.mark.parametrize("scaling", ["exact", "diag", "lqer"])
def test_placement_of_moments_changes_no_byte(model, text, tmp_path, scaling):
    files = []
    for placement in ("device", "host", "disk"):
        run = make_run(model, text, tmp_path / placement, scaling=scaling)
        stage = calibrated(run, placement=placement)
        for index in range(3):
            commit(stage, index)
        files.append({
            (record.unit, kind): entry.sha256
            for record in stage.area.records().values()
            for kind, entry in record.files.items()
        })  # fmt: skip
    assert len(files[0]) == 2 * 3
    assert files[0] == files[1] == files[2]


def test_moments_on_disk_are_mapped_from_the_scratch_folder_and_leave_nothing(model, text, tmp_path):
    stage = calibrated(make_run(model, text, tmp_path / "out"), placement="disk")
    maps = Path("/proc/self/maps").read_text()
    assert str(stage.scratch.path) in maps
    for index in range(3):
        commit(stage, index)
    assert list(stage.scratch.path.iterdir()) == []
    assert str(stage.scratch.path) not in Path("/proc/self/maps").read_text()


def spoil(model: Path, folder: Path, name: str, row: int, value: float) -> Path:
    """A copy of the checkpoint with one row of a tensor overwritten."""
    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    tensors[name][row] = value
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused_by_name(model, text, tmp_path, value):
    name = "model.layers.1.mlp.up_proj.weight"
    bad = spoil(model, tmp_path / "bad", name, 3, value)
    stage = Stage(make_run(bad, text, tmp_path / "out"), "host", 1)
    stage.open(one_stage(blocks=(0,)))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        stage.open(one_stage(blocks=(0, 1)))


def test_embedding_that_is_not_finite_is_refused_with_the_rest(model, text, tmp_path):
    bad = spoil(model, tmp_path / "bad", "model.embed_tokens.weight", 0, float("nan"))
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight"):
        Stage(make_run(bad, text, tmp_path / "out"), "host", 1).store_rest(1)


def poisoned(run: Run) -> Stage:
    """A stage with block 1, calibrated from a stored boundary whose sequences each end in a row that holds NaN."""
    stage = Stage(run, "host", 1)
    hashes = []
    for sequence in range(SAMPLES):
        hidden = torch.randn(1, LENGTH, 64, generator=torch.Generator().manual_seed(sequence))
        hidden[0, -1, 5] = torch.nan
        hashes.append(stage.boundaries.save(1, sequence, hidden))
    stage.boundaries.complete(1, hashes)
    stage.open(one_stage(blocks=(1,), collect=frozenset({1}), start=1))
    stage.forward(tuple(range(SAMPLES)), None)
    stage.end_forward()
    return stage


def test_rows_that_are_not_finite_above_the_limit_stop_the_block_by_name(model, text, tmp_path):
    stage = poisoned(make_run(model, text, tmp_path / "out"))
    expected = r"layer model\.layers\.1\.self_attn\.q_proj: 4 of 96 input rows hold NaN or Inf.*--max-bad-rows"
    with pytest.raises(CalibrationError, match=expected):
        stage.solve(1, 1)
    assert stage.area.records() == {}


def test_rows_that_are_not_finite_within_the_limit_are_left_out_and_counted(model, text, tmp_path):
    run = make_run(model, text, tmp_path / "out", max_bad_rows=1.0)
    stage = poisoned(run)
    assert all(moment.isfinite().all() for moment in totals(stage).values())
    commit(stage, 1)
    layers = {layer["type"]: layer for layer in stage.area.records()["00001"].layers}
    assert layers["self_attn.q_proj"]["excluded_rows"] == SAMPLES
    assert all(layer["tokens"] + layer["excluded_rows"] == SAMPLES * LENGTH for layer in layers.values())
    assert all(tensor.isfinite().all() for tensor in committed(run, stage, "00001", "adapter").values())


def test_stage_without_calibration_solves_from_the_weights_alone(model, tmp_path):
    config = QuantizeConfig(model=str(model), scaling="identity", rank=4, split="criterion")
    run = prepare.make_run(prepare.open_sources(config), str(tmp_path / "out"), on_gpu=False)
    stage = Stage(run, "host", 1)
    stage.open(one_stage(start=None))
    stage.end_forward()
    commit(stage, 2)
    layers = stage.area.records()["00002"].layers
    assert all(layer["tokens"] == 0 for layer in layers)
    assert all(layer["objective"]["stored"] < layer["energy"] for layer in layers)


def test_second_commit_of_a_generation_leaves_the_first(model, text, tmp_path):
    run = make_run(model, text, tmp_path / "out")
    stages = [calibrated(run), calibrated(run)]
    commit(stages[0], 0)
    first = stages[0].area.records()[unit_name(0)]
    commit(stages[1], 0)
    assert stages[1].area.records()[unit_name(0)] == first


@pytest.mark.parametrize("threads", [2, 5])
def test_layers_solved_side_by_side_are_stored_in_order_and_with_the_same_bytes(model, text, tmp_path, threads):
    run = make_run(model, text, tmp_path / "out")
    first = calibrated(run)
    commit(first, 1)
    alone = first.area.records()["00001"]
    second = calibrated(run)
    second.threads = threads
    torch.set_num_threads(threads)
    assert layers_at_once(run.graph.blocks[1], run.quantized, threads, on_gpu=False) == min(threads, 4)
    commit(second, 1, generation=2)
    beside = second.area.records()["00001"]
    assert beside.generation == 2
    assert {kind: entry.sha256 for kind, entry in beside.files.items()} == {
        kind: entry.sha256 for kind, entry in alone.files.items()
    }
    assert [layer["name"] for layer in beside.layers] == [layer["name"] for layer in alone.layers]
    assert torch.get_num_threads() == threads


def test_tuned_blocks_err_less_and_their_bytes_do_not_depend_on_threads(model, text, tmp_path):
    tensors, records = [], []
    for threads in (1, 2):
        options = {"method": "qer", "rank": 1, "grid": "int", "scales": "absmax", "tune_steps": 20, "tune_batch": 3}
        run = make_run(model, text, tmp_path / str(threads), bits=2, num_samples=16, seq_len=64, **options)
        stage = Stage(run, "host", threads)
        stage.open(one_stage())
        stage.forward(range(0, 3), None)
        stage.forward(range(3, 16), None)
        stage.end_forward()
        for index in (0, 1, 2):
            commit(stage, index)
        tensors.append([committed(run, stage, unit_name(i), kind) for i in range(3) for kind in ("base", "adapter")])
        records.append([stage.area.records()[unit_name(index)] for index in range(3)])
    for first, second in zip(*tensors, strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    for record in records[0]:
        (tuning,) = {json.dumps(layer["tuning"]) for layer in record.layers}  # one per block
        found = json.loads(tuning)
        assert found["after"] < found["before"]
        assert 0 < found["step"] <= 20
        assert record.seconds["tune"] > 0.0


def test_tuning_is_towards_the_original_blocks_output(model, text, tmp_path):
    run = make_run(model, text, tmp_path / "out", bits=2, num_samples=8, tune_steps=10)
    stage = calibrated(run)
    inputs, targets = stage.states[1], stage.states[2]
    held = stage.held[1]
    solutions = BlockSolver(run, held.block, held.source, held.moments, stage.device).solve(threads=1)
    commit(stage, 1)
    (tuning,) = {json.dumps(layer["tuning"]) for layer in stage.area.records()["00001"].layers}
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model
    rotary = original.rotary_emb(inputs.load(0), torch.arange(LENGTH).unsqueeze(0))
    block = original.layers[1]
    with torch.no_grad():
        y = block(inputs.load(7), position_embeddings=rotary)
        assert torch.allclose(y, targets.load(7), atol=1e-5)
        for name, solution in solutions.items():
            block.get_submodule(name.partition("layers.1.")[2]).weight.copy_(solution.weight(run.grid))
        off = block(inputs.load(7), position_embeddings=rotary) - y
    before = float((off.square().mean(-1) / y.square().mean(-1)).mean())
    assert json.loads(tuning)["before"] == pytest.approx(before, rel=1e-3)


def test_states_are_kept_for_tuning_alone(model, text, tmp_path):
    assert calibrated(make_run(model, text, tmp_path / "plain")).states == {}
    stage = calibrated(make_run(model, text, tmp_path / "tuned", tune_steps=1), one_stage(collect=frozenset({1})))
    assert sorted(stage.states) == [1, 2]
    assert len(stage.states[1]) == SAMPLES
