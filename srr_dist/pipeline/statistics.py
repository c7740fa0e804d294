"""Moments and sketches kept in storage: a model is calibrated once on a text, and every run on the two shares the sums.

One object per sum, below the fingerprint of everything that it depends on, and named by its own sha256:

    <statistics>/<fingerprint>/model.layers.0.mlp.up_proj/<sha256>.safetensors              moment of an input
    <statistics>/<fingerprint>/model.layers.0.mlp.up_proj.output/<sha256>.safetensors       side of a layer's sketch
    <statistics>/<fingerprint>/model.layers.0.mlp.up_proj.held-out/<sha256>.safetensors     its held-out gradients

An object is whole or not there, and its name says whether it is damaged, so that no record is needed beside it. What
is kept are the float64 sums themselves: a run that takes them gives the bytes of a run that sums them anew.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from srr_dist.calibration import InputMoment
from srr_dist.calibration.sketches import HeldOut
from srr_dist.checkpoint.tensors import TensorEntry
from srr_dist.config import BITS
from srr_dist.errors import StoreError
from srr_dist.export.tensorfile import TensorFile, decode_tensor, encode_header
from srr_dist.pipeline.run import Run, dtype_name, versions
from srr_dist.store import ObjectStore
from srr_dist.store.documents import encode

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""Raised whenever the same model and tokens give other sums."""

_COUNTS = ("tokens", "excluded", "weight")
_DTYPES = {torch.float64: "F64", torch.bfloat16: "BF16"}
A = TypeVar("A")


class Statistics:
    """The moments kept for a run and all that share its model, tokens, forward passes and scaling.

    A run without ``--statistics`` finds nothing and keeps nothing.

    Args:
        run: the run.
        sketch: a kind of sketch, to have what is kept of these instead, for all runs that share model, tokens, forward
            passes, kind, width of bands and the seed of the labels.
    """

    def __init__(self, run: Run, sketch: str = "") -> None:
        self._store = ObjectStore(run.statistics) if run.statistics else None
        kind: dict[str, str | int]
        if sketch:
            kind = {"sketch": sketch, "band": run.config.sketch_band, "seed": run.config.seed}
        else:
            kind = {"scaling": run.config.scaling, "first_token_weight": run.first_token_weight}
        self._identity = encode(
            {
                "source": run.checkpoint.identity,
                "tokens": run.tokens_sha256,
                "dtype": dtype_name(run.dtype),
                "format_version": FORMAT_VERSION,
                **kind,
            },
            "statistics",
        )
        self.fingerprint = hashlib.sha256(self._identity).hexdigest()

    def available(self) -> set[str]:
        """Names of what is kept; of moments, those of the inputs as ``Linear.input`` has them."""
        if self._store is None:
            return set()
        return {path.split("/")[1] for path in self._store.list(self.fingerprint)}

    def save(self, name: str, moment: InputMoment, scratch: Path) -> None:
        """Keep a moment, or a side of a sketch; ``scratch`` is a local folder with space for it."""
        self._keep(name, _parts(moment), {count: str(getattr(moment, count)) for count in _COUNTS}, scratch)

    def save_held_out(self, name: str, held: HeldOut, scratch: Path) -> None:
        """Keep held-out gradients; ``scratch`` as above."""
        self._keep(name, held.tensors(), {}, scratch)

    def save_curves(self, name: str, curves: Mapping[str, Mapping[int, float]], scratch: Path) -> None:
        """Keep what codes of each of ``BITS`` do to the loss, by the layer; ``scratch`` as above."""
        errors = {layer: [curve[bits] for bits in BITS] for layer, curve in curves.items()}
        self._keep(
            name, {layer: torch.tensor(each, dtype=torch.float64) for layer, each in errors.items()}, {}, scratch
        )

    def load(self, name: str, moment: InputMoment) -> bool:
        """Fill ``moment``, new and of zeros, with what is kept under ``name``.

        Returns:
            Whether there was a sound object. Damaged ones are removed, so that the moment is summed and kept anew.
        """
        return self._sound(name, partial(_fill, moment)) is not None

    def load_held_out(self, name: str) -> HeldOut | None:
        """The held-out gradients kept under ``name``; None if there are no sound ones, as above."""
        return self._sound(name, lambda file: HeldOut.of(dict(_checked(file))))

    def load_curves(self, name: str) -> dict[str, dict[int, float]] | None:
        """The curves kept under ``name``; None if there are no sound ones, as above."""

        def read(file: TensorFile) -> dict[str, dict[int, float]]:
            return {layer: dict(zip(BITS, errors.tolist(), strict=True)) for layer, errors in _checked(file)}

        return self._sound(name, read)

    def _keep(self, name: str, tensors: Mapping[str, Tensor], facts: dict[str, str], scratch: Path) -> None:
        """Write and upload the safetensors file of these tensors, one after the other."""
        if self._store is None:
            return
        metadata = {"format": "pt", "identity": self._identity.decode(), "versions": encode(versions(), name).decode()}
        local, digest = scratch / uuid.uuid4().hex, hashlib.sha256()
        with local.open("wb") as stream:
            for piece in _pieces(tensors, metadata | facts):
                digest.update(piece)
                stream.write(piece)
        path = f"{self.fingerprint}/{name}/{digest.hexdigest()}.safetensors"
        if not self._store.exists(path):
            self._store.upload(local, path)
        local.unlink()

    def _sound(self, name: str, read: Callable[[TensorFile], A]) -> A | None:
        """What is read from the first sound object under ``name``; those before it are removed."""
        assert self._store is not None, "only what is available can be loaded"
        for path in self._store.list(f"{self.fingerprint}/{name}"):
            try:
                return read(TensorFile.open(self._store, path))
            except (StoreError, LookupError, ValueError) as error:
                self._store.delete(path)
                log.warning("%s: removed, since it is damaged: %s", self._store.location(path), error)
        return None


def _parts(moment: InputMoment) -> dict[str, Tensor]:
    return {f"rows.{row}": part for row, part in moment.parts().items()}


def _fill(moment: InputMoment, file: TensorFile) -> InputMoment:
    """Read part by part, so that never more than one is in memory beside the moment."""
    parts = _parts(moment)
    found, expected = map(_contents, (file.entries.values(), _entries(parts)))
    if found != expected:
        raise StoreError(f"holds {found}, expected {expected}")
    for name, part in _checked(file):
        parts[name].copy_(part)
    for count in _COUNTS:
        setattr(moment, count, int(file.metadata[count]))
    return moment


def _checked(file: TensorFile) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file by name; StoreError after the last one if the bytes are not those that its name tells."""
    digest = hashlib.sha256(file.header)
    for entry in file.entries.values():
        data = file.raw(entry.start, entry.stop)
        digest.update(data)
        yield entry.name, decode_tensor(entry, data)
    if (sha256 := digest.hexdigest()) != Path(file.path).stem:
        raise StoreError(f"its sha256 is {sha256}")


def _pieces(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """The safetensors file of these tensors, one by one."""
    yield encode_header(_entries(tensors), metadata)
    for tensor in tensors.values():
        yield tensor.contiguous().cpu().view(torch.uint8).numpy().data.cast("B")


def _entries(tensors: Mapping[str, Tensor]) -> list[TensorEntry]:
    return [
        TensorEntry(name, "", 0, tensor.nbytes, tuple(tensor.shape), _DTYPES[tensor.dtype], name, tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]


def _contents(entries: Iterable[TensorEntry]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(entry.name, entry.dtype, entry.shape) for entry in entries]
