"""Folders of processes that end, by themselves or killed, and of such that live on."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from srr_dist.scratch import Scratch, sweep

HOLD = """
import sys
from srr_dist.scratch import Scratch
scratch = Scratch()
(scratch.path / "tensor").write_bytes(bytes(1000))
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, of this test alone."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def holder() -> tuple[subprocess.Popen[str], Path]:
    """A process with a folder, and that folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_folder_goes_with_its_context_with_all_that_is_in_it(temporary: Path) -> None:
    with Scratch() as folder:
        assert folder.parent == temporary
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("more")
    assert list(temporary.iterdir()) == []


def test_folder_goes_with_the_object_that_holds_it(temporary: Path) -> None:
    scratch = Scratch()
    assert list(temporary.iterdir()) == [scratch.path]
    del scratch
    assert list(temporary.iterdir()) == []


def test_folder_of_a_process_that_ends_goes_with_it(temporary: Path) -> None:
    process, folder = holder()
    assert folder.exists()
    process.communicate("")
    assert not folder.exists()


def test_folder_of_a_killed_process_is_removed_by_the_next_one_and_that_of_a_living_one_stays(temporary: Path) -> None:
    (killed, left), (living, kept) = holder(), holder()
    killed.kill()
    killed.communicate()
    assert (left / "tensor").exists()
    with Scratch() as own:
        assert not left.exists()
        assert {each.name for each in temporary.iterdir()} == {own.name, kept.name}
        sweep()
        assert own.exists() and (kept / "tensor").exists()
    living.communicate("")


def test_other_folders_are_left_alone(temporary: Path) -> None:
    (temporary / "srr-other").mkdir()
    sweep()
    assert (temporary / "srr-other").exists()
