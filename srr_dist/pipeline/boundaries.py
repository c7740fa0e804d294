"""Boundary activations: the hidden states that enter a window, kept so that a restart need not begin at the tokens.

One object per calibration sequence, under a name that never changes its content, and a create-only record with their
hashes: without the record a boundary does not exist. Gradients on their way back are kept in the same form.

    boundaries/00004/00012.safetensors      hidden states [1, T, d] of sequence 12 before block 4
    boundaries/00004.json                   {"sha256": [one per sequence]}
    gradients/00004/00012.safetensors       the gradient [1, T, d] of its loss by these hidden states
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import safetensors.torch
from torch import Tensor

from srr_dist.errors import StoreError
from srr_dist.pipeline.run import Run
from srr_dist.store import RunArea

_WRITERS = 2
_RECORD = re.compile(r"([0-9]{5})\.json")


class Boundaries:
    """The boundaries of a run. Holds no state but the records it has read.

    Args:
        area: of the run.
        kind: ``boundaries``, of hidden states, or ``gradients``.
        given: the block in front of which nothing needs to be stored: 0, where the tokens are; for gradients the number
            of blocks, where the head is.
    """

    def __init__(self, area: RunArea, kind: str = "boundaries", given: int = 0) -> None:
        self._area, self._kind, self._given = area, kind, given
        self._hashes: dict[int, list[str]] = {}

    def available(self) -> set[int]:
        """Blocks in front of which a complete boundary lies, and always the given one."""
        folder = self._area.path(self._kind)
        names = (path.removeprefix(f"{folder}/") for path in self._area.store.list(folder))
        return {self._given} | {int(match[1]) for name in names if (match := _RECORD.fullmatch(name))}

    def save(self, block: int, sequence: int, hidden: Tensor) -> str:
        """Store ``hidden: [1, T, d]`` before ``block``; returns its sha256."""
        data = safetensors.torch.save({"hidden": hidden.contiguous()})
        self._area.store.put(self._object(block, sequence), data)
        return hashlib.sha256(data).hexdigest()

    def complete(self, block: int, hashes: list[str]) -> None:
        """Declare the boundary before ``block`` complete; of two writers the first one's record stays."""
        self._area.store.create(self._record(block), json.dumps({"sha256": hashes}).encode())

    def load(self, block: int, sequence: int) -> Tensor:
        """The hidden states ``[1, T, d]`` of a sequence before ``block``.

        Raises:
            StoreError: they are missing or not as recorded. The boundary is then discarded, so that the next attempt
                begins at an earlier one.
        """
        if block not in self._hashes:
            self._hashes[block] = self._area.store.get_json(self._record(block))["sha256"]
        path = self._object(block, sequence)
        data = self._area.store.get(path) if self._area.store.exists(path) else b""
        if (found := hashlib.sha256(data).hexdigest()) != (expected := self._hashes[block][sequence]):
            self.discard(block)
            location = self._area.store.location(path)
            raise StoreError(f"{location}: missing or damaged, sha256 {found}, its record says {expected}")
        return safetensors.torch.load(data)["hidden"]

    def discard(self, block: int) -> None:
        """Remove the boundary before ``block``; its record first, so that it is never half there."""
        self._hashes.pop(block, None)
        self._area.store.delete(self._record(block))
        self._area.store.delete_tree(self._area.path(f"{self._kind}/{block:05d}"))

    def clear(self) -> None:
        """Remove every boundary, also what was left of those that a kill kept from being completed."""
        for block in self.available() - {self._given}:
            self._area.store.delete(self._record(block))
        self._area.store.delete_tree(self._area.path(self._kind))

    def _object(self, block: int, sequence: int) -> str:
        return self._area.path(f"{self._kind}/{block:05d}/{sequence:05d}.safetensors")

    def _record(self, block: int) -> str:
        return self._area.path(f"{self._kind}/{block:05d}.json")


def crossings(run: Run, area: RunArea) -> tuple[Boundaries, Boundaries]:
    """What is stored between windows: hidden states, and gradients that come back."""
    return Boundaries(area), Boundaries(area, "gradients", given=len(run.graph.blocks))


class BoundaryWriter:
    """Stores a boundary while the sequences that make it still pass.

    Args:
        boundaries: where.
        block: before which.
    """

    def __init__(self, boundaries: Boundaries, block: int) -> None:
        self._boundaries, self._block = boundaries, block
        self._pool = ThreadPoolExecutor(_WRITERS)
        self._hashes: dict[int, Future[str]] = {}

    def put(self, sequences: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Begin to store these sequences' ``[1, T, d]``; those that come once more are the same."""
        for sequence, tensor in zip(sequences, tensors, strict=True):
            if sequence not in self._hashes:
                save = self._boundaries.save
                self._hashes[sequence] = self._pool.submit(save, self._block, sequence, tensor.cpu())

    def end(self) -> None:
        """All were put: wait until they are durable, and declare the boundary complete."""
        self._boundaries.complete(self._block, [self._hashes[sequence].result() for sequence in sorted(self._hashes)])
        self._pool.shutdown()
