"""``python -m srr_dist.quantize`` from start to end, disturbed in every way, always ends in the same bytes."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from srr_dist import quantize as verb
from srr_dist import verify
from srr_dist.config import QuantizeConfig
from srr_dist.export.adapter import lora_names
from srr_dist.export.base import PACKED, dense_tensors
from srr_dist.pipeline.cluster import Cluster
from srr_dist.pipeline.memory import Budget
from srr_dist.pipeline.plan import make_plan
from srr_dist.pipeline.prepare import make_run, open_sources
from srr_dist.store import BlockRecord, ObjectStore, RunArea
from tests import s3
from tests.commands import end, start, wait_until
from tests.conftest import Job

pytestmark = pytest.mark.slow

VIEWS = {"README.md", "report.json", "report.html"}
UNITS = [f"{block:05d}" for block in range(6)] + ["rest"]


def record_files(output: Path) -> list[Path]:
    return sorted(output.glob(".srr/*/blocks/*.json"))


def record_contents(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in record_files(output)}


def records(output: Path) -> dict[str, BlockRecord]:
    store = ObjectStore(str(output))
    (fingerprint,) = RunArea.find(store)
    return RunArea(store, fingerprint).records()


def manifest(output: Path) -> bytes:
    return (output / "manifest.json").read_bytes()


def quantize(job: Job, output: Path | str, **changes) -> int:
    """In this process, which has imported everything, where none is to be killed."""
    return verb.main(job.flags(output, **changes))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished output, to be damaged or extended."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def snapshot(output: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and content of every file but the views."""
    files = (path for path in output.rglob("*") if path.is_file() and path.name not in VIEWS)
    return {str(path.relative_to(output)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_finished_output_is_complete_and_sound(finished, capsys):
    assert verify.main([str(finished)]) == 0
    assert "everything is as recorded" in capsys.readouterr().out
    assert sorted(records(finished)) == UNITS
    assert {path.name for path in finished.iterdir()} == {"base", "adapter", "manifest.json", "COMMIT", ".srr"} | VIEWS
    assert list(finished.glob(".srr/*/boundaries/*")) == []


def test_finished_output_loads_in_transformers_and_peft_as_it_was_committed(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, finished / "adapter").base_model.model
    loaded = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    seen = set()
    for record in records(finished).values():
        tensors = {kind: safetensors.torch.load_file(finished / entry.path) for kind, entry in record.files.items()}
        dense = dense_tensors(tensors["base"], {layer["name"]: layer["bits"] for layer in record.layers})
        for packed in (name for name in tensors["base"] if name.endswith(PACKED)):
            name = packed.removesuffix(PACKED)
            L, R = (tensors["adapter"][key].float() for key in lora_names(name))
            module = loaded[name]
            merged = module.base_layer.weight + module.get_delta_weight("default")
            assert torch.equal(merged, dense[f"{name}.weight"].float() + L @ R), name
            seen.add(name)
    assert seen == set(loaded)
    assert len(seen) == 6 * 7


def test_finished_output_is_nearer_to_the_model_than_its_base_alone(finished):
    layers = [layer for record in records(finished).values() for layer in record.layers]
    assert len(layers) == 6 * 7
    assert all(layer["objective"]["stored"] < layer["energy"] for layer in layers)
    assert all(layer["objective"]["chosen"] <= layer["objective"]["k0"] for layer in layers)


def test_same_command_on_a_finished_output_changes_nothing(job, copied, caplog):
    before = snapshot(copied)
    assert quantize(job, copied) == 0
    assert snapshot(copied) == before
    assert "is finished already" in caplog.text
    assert "reading weights" not in caplog.text


def test_views_missing_after_a_kill_are_written_anew(job, copied):
    for name in VIEWS:
        (copied / name).unlink()
    assert quantize(job, copied) == 0
    assert {path.name for path in copied.iterdir()} >= VIEWS


def test_output_does_not_depend_on_the_number_of_workers_and_windows(job, finished, tmp_path):
    assert quantize(job, tmp_path / "out", workers=2, blocks_per_stage=1) == 0
    assert manifest(tmp_path / "out") == manifest(finished)


def test_output_does_not_depend_on_where_moments_lie(job, finished, tmp_path):
    config = QuantizeConfig(model=str(job.model), calibration=str(job.text), num_samples=8, seq_len=32, rank=4)
    plan = make_plan(make_run(open_sources(config), "", on_gpu=False), Cluster(1, 2, 0, Budget(2**40, None)), 1)
    short = plan.holding.host_bytes - 1  # one block fits with its moments on disk only
    assert quantize(job, tmp_path / "out", host_memory=short) == 0
    planned = [record.stage["planned_memory"]["host"] for record in records(tmp_path / "out").values() if record.stage]
    assert len(planned) == 6
    assert max(planned) <= short
    assert manifest(tmp_path / "out") == manifest(finished)


def killed(job: Job, output: Path, committed: int) -> dict[str, bytes]:
    """Begin a run, kill its driver when this many units are committed; returns the records it leaves."""
    process = start("quantize", *job.flags(output, blocks_per_stage=1))
    wait_until(lambda: len(record_files(output)) >= committed, process)
    process.kill()
    assert end(process).code == -signal.SIGKILL
    assert not (output / "COMMIT").exists()
    return record_contents(output)


def test_run_killed_and_left_with_damaged_boundaries_goes_back_to_the_tokens(job, finished, tmp_path, caplog):
    output = tmp_path / "out"
    before = killed(job, output, committed=3)
    stored = list(output.glob(".srr/*/boundaries/*/*.safetensors"))
    assert stored
    for file in stored:
        file.write_bytes(file.read_bytes()[:-1])
    assert quantize(job, output) == 0
    assert "missing or damaged" in caplog.text
    assert {name: record_contents(output)[name] for name in before} == before
    assert manifest(output) == manifest(finished)


def test_another_configuration_on_the_same_output_is_refused_by_field(job, copied, capfd):
    before = snapshot(copied)
    assert quantize(job, copied, rank=8) == 2
    shown = capfd.readouterr().err
    assert "srr-dist: " in shown
    assert "identity.rank: 4 -> 8" in shown
    assert "Traceback" not in shown
    assert snapshot(copied) == before


def test_damaged_blocks_alone_are_redone_in_the_next_generation(job, finished, copied):
    damaged = records(copied)
    (copied / damaged["00001"].files["base"].path).unlink()
    truncated = copied / damaged["00004"].files["adapter"].path
    truncated.write_bytes(truncated.read_bytes()[:-1])
    (copied / "base" / "model-00003-of-00007.safetensors").unlink()
    assert quantize(job, copied) == 0
    again = records(copied)
    assert {unit: record.generation for unit, record in again.items() if record.generation > 1} == {
        "00001": 2,
        "00004": 2,
    }
    assert all(again[unit] == damaged[unit] for unit in again if unit not in ("00001", "00004"))
    assert manifest(copied) == manifest(finished)
    assert verify.main([str(copied)]) == 0


def test_dense_export_is_added_to_a_finished_output(job, finished, copied):
    before = record_contents(copied)
    assert quantize(job, copied, export="dense") == 0
    assert record_contents(copied) == before
    assert (copied / "base" / "config.json").exists()
    assert verify.main([str(copied)]) == 0
    dense = AutoModelForCausalLM.from_pretrained(copied / "dense", dtype=torch.float32).state_dict()
    unmerged = AutoModelForCausalLM.from_pretrained(finished / "base", dtype=torch.float32)
    unmerged = PeftModel.from_pretrained(unmerged, finished / "adapter").merge_and_unload().state_dict()
    assert dense.keys() == unmerged.keys()
    for name, tensor in dense.items():
        torch.testing.assert_close(tensor, unmerged[name], rtol=0, atol=1e-6)


def test_dry_run_shows_the_plan_and_writes_nothing(job, tmp_path, capfd):
    assert quantize(job, tmp_path / "out", dry_run=True) == 0
    assert not (tmp_path / "out").exists()
    out = capfd.readouterr().out
    for shown in (
        "blocks         6",
        "windows        2",
        "memory         host per worker",
        "source read",
        "blocks 4–5",
    ):
        assert shown in out


def test_output_that_the_workers_do_not_share_is_refused_after_one_window(job, capfd):
    assert quantize(job, "memory://out", blocks_per_stage=1) == 2
    (complaint,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("srr-dist: ")]
    assert "blocks 0–0 were worked off" in complaint


def test_real_s3_server_that_is_away_for_half_a_minute_is_waited_for_and_no_secret_is_shown(
    job, finished, own_server, monkeypatch, capfd
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    source, output = ObjectStore("s3://bucket/model"), ObjectStore("s3://bucket/runs/out")
    for file in job.model.iterdir():
        source.put(file.name, file.read_bytes())
    # Ray embedded, as on a laptop.
    process = start("quantize", *job.flags(output.url, model=source.url, ray_address=None, blocks_per_stage=3))
    wait_until(lambda: any("/blocks/" in path and path.endswith(".json") for path in output.list()), process)
    own_server.kill()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(30)
    own_server.start()
    written = end(process)
    assert written.code == 0, written.err
    assert "trying again" in written.err
    assert output.get("manifest.json") == manifest(finished)
    assert verify.main([output.url]) == 0
    texts = [written.out, written.err, *capfd.readouterr()]
    shown = [output.get(path) for path in output.list()] + [text.encode() for text in texts]
    assert len(shown) > 30
    assert not any(secret.encode() in text for text in shown for secret in (s3.KEY, s3.SECRET))
