"""A unit's result on its way to storage: written to a local disk, uploaded and recorded beside the next unit's work.

One unit is under way at a time: the next waits with its files, so that a slow store holds the worker back instead of
filling its disk.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from srr_dist.pipeline.run import Run, versions
from srr_dist.store import BlockRecord, RunArea


class Commits:
    """Units that a worker commits.

    Args:
        run: whose units they are.
        area: where to.
        hardware: the worker's, in words.
        scratch: a folder of the local disk, which holds files until they are uploaded.
    """

    def __init__(self, run: Run, area: RunArea, hardware: str, scratch: Path) -> None:
        self._run, self._area, self._hardware, self._scratch = run, area, hardware, scratch
        self._uploader = ThreadPoolExecutor(1)
        self._under_way: dict[str, Future[BlockRecord]] = {}

    def begin(
        self,
        unit: str,
        generation: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        source: Mapping[str, Tensor],
        seconds: Mapping[str, float],
        *,
        layers: list[dict[str, Any]],
        stage: Mapping[str, Any],
    ) -> None:
        """Write a unit's files to the local disk, then let them be uploaded and recorded; ``result`` tells the end.

        Args:
            unit: whose result it is.
            generation: of the record.
            tensors: of each file, by the file's name without its suffix; a file without tensors is not written.
            source: the weights it was made from.
            seconds: by kind of work, without what storing will take.
            layers: records of the layers.
            stage: where it was made.
        """
        wait(self._under_way.values())  # what became of them, `result` tells
        started, attempt = time.perf_counter(), uuid.uuid4().hex
        files = {name: self._write(attempt, name, content) for name, content in tensors.items() if content}
        draft = BlockRecord(
            unit=unit,
            generation=generation,
            fingerprint=self._run.fingerprint,
            attempt=attempt,
            files={},
            layers=layers,
            source_sha256=digest_of(source),
            seconds={**seconds, "write": seconds.get("write", 0.0) + time.perf_counter() - started},
            versions=versions(),
            hardware=self._hardware,
            finished=0.0,
            stage=dict(stage),
        )
        self._under_way[unit] = self._uploader.submit(self._publish, draft, files)

    def result(self, unit: str) -> BlockRecord:
        """The record that counts, once it is there: this attempt's, or the one that was first; or the error."""
        return self._under_way.pop(unit).result()

    def _publish(self, draft: BlockRecord, files: Mapping[str, Path]) -> BlockRecord:
        started, entries = time.perf_counter(), {}
        for name, local in files.items():
            target = self._area.attempt_path(draft.unit, draft.attempt, f"{name}.safetensors")
            entries[name] = self._area.store.upload(local, target)
            local.unlink()
        seconds = draft.seconds | {"write": draft.seconds["write"] + time.perf_counter() - started}
        return self._area.commit(replace(draft, files=entries, seconds=seconds, finished=time.time()))

    def _write(self, attempt: str, name: str, tensors: Mapping[str, Tensor]) -> Path:
        local = self._scratch / f"{attempt}-{name}"
        content = {key: tensor.contiguous() for key, tensor in tensors.items()}
        safetensors.torch.save_file(content, local, metadata={"format": "pt"})
        return local


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors in the order of their names, names included."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def summary(record: BlockRecord) -> dict[str, Any]:
    """What the driver is told of a committed unit."""
    written = sum(entry.size for entry in record.files.values())
    return {"unit": record.unit, "layers": len(record.layers), "seconds": record.seconds, "bytes": written}
