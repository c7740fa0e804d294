"""Moments kept in storage: a model is calibrated once on a text, and every run on the two shares what was summed.

One object per moment, below the fingerprint of everything that moments depend on, and named by its own sha256:

    <statistics>/<fingerprint>/model.layers.0.mlp.up_proj/<sha256>.safetensors

An object is whole or not there, and its name says whether it is damaged, so that no record is needed beside it. What
is kept are the float64 sums themselves: a run that takes them gives the bytes of a run that sums them anew.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from srr_dist.calibration import InputMoment
from srr_dist.checkpoint.tensors import TensorEntry
from srr_dist.errors import StoreError
from srr_dist.export.tensorfile import TensorFile, decode_tensor, encode_header
from srr_dist.pipeline.run import Run, dtype_name, versions
from srr_dist.store import ObjectStore
from srr_dist.store.documents import encode

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Raised whenever the same model and tokens give other sums."""


class Statistics:
    """The moments kept for a run and all that share its model, tokens, forward passes and scaling.

    A run without ``--statistics`` finds nothing and keeps nothing.
    """

    def __init__(self, run: Run) -> None:
        self._store = ObjectStore(run.statistics) if run.statistics else None
        self._identity = encode(
            {
                "source": run.checkpoint.identity,
                "tokens": run.tokens_sha256,
                "dtype": dtype_name(run.dtype),
                "scaling": run.config.scaling,
                "format_version": FORMAT_VERSION,
            },
            "statistics",
        )
        self.fingerprint = hashlib.sha256(self._identity).hexdigest()

    def available(self) -> set[str]:
        """Names of the inputs whose moments are kept, as ``Linear.input`` has them."""
        if self._store is None:
            return set()
        return {path.split("/")[1] for path in self._store.list(self.fingerprint)}

    def save(self, name: str, moment: InputMoment, scratch: Path) -> None:
        """Keep the moment of the input ``name``; ``scratch`` is a local folder with space for it."""
        if self._store is None:
            return
        local, digest = scratch / uuid.uuid4().hex, hashlib.sha256()
        metadata = {
            "format": "pt",
            "identity": self._identity.decode(),
            "versions": encode(versions(), name).decode(),
            "tokens": str(moment.tokens),
            "excluded": str(moment.excluded),
        }
        with local.open("wb") as stream:
            for piece in _pieces(moment, metadata):
                digest.update(piece)
                stream.write(piece)
        path = f"{self.fingerprint}/{name}/{digest.hexdigest()}.safetensors"
        if not self._store.exists(path):
            self._store.upload(local, path)
        local.unlink()

    def load(self, name: str, moment: InputMoment) -> bool:
        """Fill ``moment``, new and of zeros, with what is kept of the input ``name``.

        Returns:
            Whether there was a sound object. Damaged ones are removed, so that the moment is summed and kept anew.
        """
        assert self._store is not None, "only what is available can be loaded"
        for path in self._store.list(f"{self.fingerprint}/{name}"):
            try:
                self._fill(moment, TensorFile.open(self._store, path))
            except (StoreError, LookupError, ValueError) as error:
                self._store.delete(path)
                log.warning("%s: removed, since it is damaged: %s", self._store.location(path), error)
            else:
                return True
        return False

    def _fill(self, moment: InputMoment, file: TensorFile) -> None:
        """Read part by part, so that never more than one is in memory beside the moment."""
        digest, parts = hashlib.sha256(file.header), moment.parts()
        expected, found = map(_contents, (_entries(parts), file.entries.values()))
        if found != expected:
            raise StoreError(f"holds {found}, expected {expected}")
        for part, entry in zip(parts.values(), file.entries.values(), strict=True):
            data = file.raw(entry.start, entry.stop)
            digest.update(data)
            part.copy_(decode_tensor(entry, data))
        if (sha256 := digest.hexdigest()) != Path(file.path).stem:
            raise StoreError(f"its sha256 is {sha256}")
        moment.tokens, moment.excluded = int(file.metadata["tokens"]), int(file.metadata["excluded"])


def _pieces(moment: InputMoment, metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The safetensors file of a moment, part by part."""
    parts = moment.parts()
    yield encode_header(_entries(parts), metadata)
    for part in parts.values():
        yield part.contiguous().cpu().numpy().data.cast("B")


def _entries(parts: Mapping[int, Tensor]) -> list[TensorEntry]:
    sizes = {f"rows.{row}": (tuple(part.shape), part.nbytes) for row, part in parts.items()}
    return [TensorEntry(name, "", 0, size, shape, "F64", name, shape) for name, (shape, size) in sizes.items()]


def _contents(entries: Iterable[TensorEntry]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(entry.name, entry.dtype, entry.shape) for entry in entries]
