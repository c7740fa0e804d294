"""Memory that runs out while a worker reads, calibrates or solves: fewer blocks at once, then alone, then set aside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from srr_dist import quantize as verb
from srr_dist.pipeline import driver
from srr_dist.pipeline.stage import Stage
from srr_dist.store import BlockRecord, ObjectStore, RunArea
from srr_dist.store.events import read_events
from srr_dist.store.failures import read_failures
from tests.conftest import Job

pytestmark = pytest.mark.slow

SHORT = "CUDA out of memory. Tried to allocate 9 GiB"
CROWDED = {"reading": {0, 1, 2, 3}, "calibrating": {0, 1}}
"""What a stage does -> blocks that it has no memory for while it holds all of these."""
TOO_LARGE = 5
"""A block that cannot even be solved alone."""


class SmallStage(Stage):
    """A stage whose memory runs out in each of its three kinds of work."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        run_block = self.decoder.run_block

        def run_short_block(index: int, hidden: Tensor) -> Tensor:
            self._allocate("calibrating", index)
            return run_block(index, hidden)

        self.decoder.run_block = run_short_block  # type: ignore[method-assign]

    def _hold(self, block: Any, *, collect: bool) -> None:
        self._allocate("reading", block.index)
        super()._hold(block, collect=collect)

    def _solve(self, held: Any, generation: int) -> None:
        if held.block.index == TOO_LARGE:
            raise torch.OutOfMemoryError(SHORT)
        super()._solve(held, generation)

    def _allocate(self, doing: str, index: int) -> None:
        if index in CROWDED[doing] and CROWDED[doing] <= set(self._plan().blocks):
            raise torch.OutOfMemoryError(SHORT)


def area_of(output: Path) -> RunArea:
    store = ObjectStore(str(output))
    (fingerprint,) = RunArea.find(store)
    return RunArea(store, fingerprint)


def contents(record: BlockRecord) -> dict[str, str]:
    return {name: entry.sha256 for name, entry in record.files.items()}


def test_memory_that_runs_out_makes_stages_smaller_and_sets_aside_only_what_fits_nowhere(
    job: Job, finished, tmp_path, monkeypatch, capfd
):
    output = tmp_path / "out"
    monkeypatch.setattr(driver, "Stage", SmallStage)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # for workers that have no tests
    assert verb.main(job.flags(output, workers=1, blocks_per_stage=4)) == 3
    (complaint,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("srr-dist: ")]
    assert f"unit 00005: OutOfMemoryError: {SHORT}" in complaint
    area = area_of(output)
    events = read_events(area, parts=10**6)
    assert [event["blocks_per_stage"] for event in events if event["event"] == "smaller"] == [2, 1]
    attempts = [(attempt.unit, attempt.kind, attempt.doing) for attempt in read_failures(area)]
    assert attempts == [("00005", "memory", "solving")] * 4
    assert not area.store.exists("COMMIT")
    committed, undisturbed = area.records(), area_of(finished).records()
    assert committed.keys() == undisturbed.keys() - {"00005"}
    assert all(contents(record) == contents(undisturbed[unit]) for unit, record in committed.items())
