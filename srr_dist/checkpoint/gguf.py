"""A GGUF file as transformers would load it."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from srr_dist.checkpoint.tensors import Layout, TensorEntry
from srr_dist.errors import CheckpointError

SUFFIX = ".gguf"


def is_gguf(entry: TensorEntry) -> bool:
    """Whether ``entry`` lies in a GGUF file."""
    return entry.dtype.startswith("GGUF:")


def read_layout(url: str) -> Layout:
    """Not supported yet."""
    raise CheckpointError(f"{url}: GGUF files cannot be read yet; start from safetensors")


def decode(entry: TensorEntry, data: bytearray, config: PretrainedConfig) -> torch.Tensor:
    """Not supported yet."""
    raise CheckpointError(f"tensor {entry.name}: GGUF files cannot be read yet")


def companions(url: str) -> dict[str, bytes]:
    """Not supported yet."""
    raise CheckpointError(f"{url}: GGUF files cannot be read yet; start from safetensors")
