"""Runs that most tests of the exports begin with."""

from pathlib import Path

import pytest
from random_runs import CommittedRun, commit_run, llama_config

from srr_dist.store.objects import ObjectStore


@pytest.fixture
def committed(tmp_path: Path) -> CommittedRun:
    """A committed run of a two-block Llama in a local folder."""
    return commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="bfloat16"))
