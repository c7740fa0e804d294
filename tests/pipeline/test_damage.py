"""Bytes that change in a finished output: ``verify`` names them, and the same command restores just them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from srr_dist import quantize as verb
from srr_dist import status, verify
from srr_dist.store import ObjectStore, RunArea
from tests.conftest import Job

pytestmark = pytest.mark.slow


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The finished output, to be damaged; its files are no links of one another."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def flip(file: Path) -> str:
    """Change the file's last byte in place; returns its path."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return str(file)


def block_file(output: Path, unit: str, kind: str) -> Path:
    store = ObjectStore(str(output))
    (fingerprint,) = RunArea.find(store)
    return output / RunArea(store, fingerprint).records()[unit].files[kind].path


def record_contents(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.glob(".srr/*/blocks/*.json") if "damaged" not in file.name}


def problems(output: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What ``verify`` prints about each damaged file."""
    capsys.readouterr()
    code = verify.main([str(output)])
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert code == (1 if lines else 0)
    return lines


def is_finished(output: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    capsys.readouterr()
    assert status.main([str(output), "--json"]) == 0
    return bool(json.loads(capsys.readouterr().out)["complete"])


def test_changed_byte_in_a_block_is_named_and_that_block_alone_is_redone(job: Job, finished, copied, capsys):
    flip(block_file(copied, "00001", "base"))
    flip(block_file(copied, "00004", "adapter"))
    flip(copied / "base" / "model-00003-of-00007.safetensors")
    before = record_contents(copied)
    named = [line.partition(":")[0] for line in problems(copied, capsys)]
    assert [Path(name).name for name in named] == [
        "model-00003-of-00007.safetensors",
        "base.safetensors",
        "adapter.safetensors",
    ]
    assert "/blocks/00001/" in named[1]
    assert "/blocks/00004/" in named[2]
    assert not is_finished(copied, capsys)

    assert verb.main(job.flags(copied)) == 0
    after = record_contents(copied)
    assert after.keys() - before.keys() == {"00001.g2.json", "00004.g2.json"}
    assert {name: after[name] for name in before} == before
    assert problems(copied, capsys) == []
    assert is_finished(copied, capsys)
    assert (copied / "manifest.json").read_bytes() == (finished / "manifest.json").read_bytes()


@pytest.mark.parametrize("name", ["base/model-00003-of-00007.safetensors", "adapter/adapter_model.safetensors"])
def test_changed_byte_in_an_assembled_file_is_restored_without_redoing_a_block(job: Job, copied, capsys, name):
    sound = (copied / name).read_bytes()
    flip(copied / name)
    before = record_contents(copied)
    (problem,) = problems(copied, capsys)
    assert problem.startswith(f"{name}: ")
    assert not is_finished(copied, capsys)
    assert verb.main(job.flags(copied)) == 0
    assert (copied / name).read_bytes() == sound
    assert record_contents(copied) == before
    assert problems(copied, capsys) == []
    assert is_finished(copied, capsys)
