"""Safetensors files in an object store: the header in memory, tensors by ranged reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from srr_dist.checkpoint.safetensors import parse_header
from srr_dist.checkpoint.tensors import DTYPES, TensorEntry
from srr_dist.errors import CheckpointError, StoreError
from srr_dist.store.documents import decode, encode
from srr_dist.store.objects import ObjectStore


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been read and checked; picklable, holds no tensor.

    Attributes:
        header: the file's first bytes, up to the first tensor.
        entries: by name, in the order of their bytes, with offsets in the file.
    """

    store: ObjectStore
    path: str
    header: bytes
    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, store: ObjectStore, path: str) -> TensorFile:
        """Read the header of an object.

        Raises:
            StoreError: the object is missing, is no safetensors file, or is shorter or longer than its header says.
        """
        size = store.size(path)
        stop = 8 + int.from_bytes(store.get_range(path, 0, min(8, size)), "little")
        header = store.get_range(path, 0, stop)
        try:
            entries = parse_header(store.location(path), size, header[8:])
        except CheckpointError as error:
            raise StoreError(str(error)) from error
        return cls(store, path, header, {entry.name: entry for entry in entries})

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries.values())

    @property
    def metadata(self) -> dict[str, Any]:
        """The header's free text fields."""
        metadata: dict[str, Any] = decode(self.header[8:], self.store.location(self.path)).get("__metadata__", {})
        return metadata

    def raw(self, start: int, stop: int) -> bytes:
        """The file's bytes from ``start`` to ``stop``."""
        return self.store.get_range(self.path, start, stop)

    def read(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """The named tensors (all by default), by one request for the bytes from the first of them to the last."""
        wanted = [self.entries[name] for name in (self.entries if names is None else names)]
        if not wanted:
            return {}
        first = min(entry.start for entry in wanted)
        data = memoryview(self.raw(first, max(entry.stop for entry in wanted)))
        return {entry.name: decode_tensor(entry, data[entry.start - first : entry.stop - first]) for entry in wanted}


def decode_tensor(entry: TensorEntry, data: bytes | memoryview) -> torch.Tensor:
    """The tensor that ``entry`` describes, from its bytes."""
    dtype = DTYPES[entry.dtype]
    if not data:  # frombuffer refuses an empty buffer
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(entry.shape)


def encode_header(entries: Iterable[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds these tensors one after the other; equal arguments give equal bytes."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for entry in entries:
        offsets = [position, position + entry.nbytes]
        document[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        position += entry.nbytes
    text = encode(document, "safetensors header")
    text += b" " * (-len(text) % 8)  # the format wants the tensors to begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text
