"""What a stored tensor is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from srr_dist.checkpoint.location import ByteRange
from srr_dist.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The safetensors dtypes that are read; the others (float8, float4 …) only occur in quantized checkpoints."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint and where its bytes lie."""

    name: str
    """Name in the model's state dict."""
    file: str
    """Path relative to the checkpoint's URL; "" for a GGUF file, which is the URL itself."""
    start: int
    stop: int
    """Byte offsets in ``file``, ``stop`` exclusive."""
    shape: tuple[int, ...]
    """Shape in the model, also where the file stores it in another layout."""
    dtype: str
    """A safetensors dtype (``BF16``) or ``GGUF:`` and a GGML type (``GGUF:Q4_1``)."""
    stored_name: str
    """Name in the file."""
    stored_shape: tuple[int, ...]
    """Shape in the file."""

    @property
    def bytes(self) -> ByteRange:
        """The range to fetch."""
        return ByteRange(self.file, self.start, self.stop)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """What the files of a checkpoint say before any weight is read."""

    config_json: str
    sizes: dict[str, int]
    """Weight file -> bytes."""
    headers: dict[str, bytes]
    """Weight file -> its header, for the identity."""
    entries: tuple[TensorEntry, ...]
    """In file order; ``name`` and ``shape`` are not yet the model's."""
    gguf_architecture: str = ""
    """``general.architecture`` of a GGUF file, "" for safetensors."""


def check_finite(entry: TensorEntry, tensor: torch.Tensor) -> None:
    """Refuse NaN and infinite values.

    Raises:
        CheckpointError: names file and tensor, and how many of its values are not finite.
    """
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        file = f"{entry.file}: " if entry.file else ""
        raise CheckpointError(
            f"{file}tensor {entry.stored_name}: {bad} of {tensor.numel()} values are NaN or infinite; "
            "the checkpoint is damaged, fetch it again"
        )
