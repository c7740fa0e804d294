"""A checkpoint behind one picklable object: what it holds, and ranged reads of any of it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from srr_dist.checkpoint import gguf, safetensors
from srr_dist.checkpoint.location import ByteRange, fetch, list_files, resolve
from srr_dist.checkpoint.skeleton import build_skeleton, decoder_blocks, map_names, missing_names, parse_config
from srr_dist.checkpoint.tensors import DTYPES, Layout, TensorEntry, check_finite
from srr_dist.errors import CheckpointError

__all__ = ["Checkpoint", "TensorEntry", "open_checkpoint"]

log = logging.getLogger(__name__)

_SAMPLE_BYTES = 64 * 1024
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""File name patterns of what belongs beside the weights, apart from config.json."""


@dataclass(frozen=True)
class Checkpoint:
    """A source model: its tensors' places, its configuration and its identity. No open handle, no tensor data."""

    model: str
    """As the user wrote it."""
    url: str
    """fsspec URL of the folder or the .gguf file; a hub id is pinned to a commit."""
    tensors: Mapping[str, TensorEntry]
    """State-dict name of the ``AutoModelForCausalLM`` class -> place."""
    config_json: str
    """Text of config.json; for GGUF the one transformers derives."""
    identity: str
    """sha256 (hex) of the configuration and of names, sizes, headers and samples of the weight files: the same bytes
    have the same identity wherever they lie."""
    total_bytes: int
    """Size of the weight files."""
    gguf_architecture: str = ""
    """``general.architecture`` of a GGUF file, "" for safetensors."""

    @property
    def config(self) -> PretrainedConfig:
        """The transformers configuration."""
        return parse_config(self.config_json)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors in the model's shapes and the source's dtype (GGUF: dequantized to float32).

        Raises:
            CheckpointError: an unknown name, a file that is gone or shorter than it was, or a NaN or infinite value.
        """
        entries = [self._entry(name) for name in names]
        buffers = fetch(self.url, [entry.bytes for entry in entries])
        config = self.config if self.gguf_architecture else None
        tensors = {}
        for entry, data in zip(entries, buffers, strict=True):
            tensor = gguf.decode(entry, data, self.gguf_architecture, config) if config else _as_tensor(entry, data)
            check_finite(entry, tensor)
            tensors[entry.name] = tensor
        return tensors

    def check(self, names: Iterable[str]) -> None:
        """Read the named tensors only to find out whether they can be; raises as ``read``."""
        self.read(names)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.tensors:
            raise CheckpointError(f"{self.model}: holds no tensor {name}")
        return self.tensors[name]

    def companions(self) -> dict[str, bytes]:
        """File name -> content of what belongs beside the weights: configuration, tokenizer, chat template, licence."""
        if self.gguf_architecture:
            return gguf.companions(self.url) | {"config.json": self.config_json.encode()}
        sizes = {
            name: size
            for name, size in sorted(list_files(self.url).items())
            if any(fnmatch(name, pattern) for pattern in _COMPANIONS)
        }
        contents = fetch(self.url, [ByteRange(name, 0, size) for name, size in sizes.items()])
        files = {name: bytes(content) for name, content in zip(sizes, contents, strict=True)}
        return {"config.json": self.config_json.encode()} | files

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: it has none that transformers can load.
        """
        with TemporaryDirectory(prefix="srr-tokenizer-") as folder:
            for name, content in self.companions().items():
                (Path(folder) / name).write_bytes(content)
            try:
                return AutoTokenizer.from_pretrained(folder)
            except Exception as error:  # each tokenizer class fails in its own way
                raise CheckpointError(f"{self.model}: no usable tokenizer beside the weights: {error}") from error


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and check everything that can be checked without reading its weights.

    Args:
        model: a local folder, an fsspec URL of a folder, a .gguf file (path or URL), or a hub id ``org/name``.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: names the file and the tensor that is missing, damaged or unsupported.
    """
    url = resolve(model, revision)
    try:
        layout = gguf.read_layout(url) if url.endswith(gguf.SUFFIX) else safetensors.read_layout(url)
        skeleton = build_skeleton(parse_config(layout.config_json), torch.float32)
        decoder_blocks(skeleton)
        tensors = _place(skeleton, layout.entries)
    except CheckpointError as error:
        raise CheckpointError(f"{model}: {error}") from error
    return Checkpoint(
        model,
        url,
        tensors,
        layout.config_json,
        _identity(url, layout),
        sum(layout.sizes.values()),
        layout.gguf_architecture,
    )


def _place(skeleton: PreTrainedModel, entries: Sequence[TensorEntry]) -> dict[str, TensorEntry]:
    """State-dict name -> entry, in the model's order, once every tensor the model needs is there and fits."""
    stored = {entry.name: entry for entry in entries}
    mapped = map_names(skeleton, stored)
    missing = missing_names(skeleton, mapped)
    if missing:
        raise CheckpointError(
            f"lacks {len(missing)} tensors that {type(skeleton).__name__} needs, first {missing[0]}; "
            "the download is incomplete or config.json belongs to another model"
        )
    unused = sorted(stored.keys() - mapped.values())
    if unused:
        log.warning("%d stored tensors have no place in the model and are ignored, first %s", len(unused), unused[0])
    state = skeleton.state_dict()
    return {name: _fitted(stored[mapped[name]], name, state[name]) for name in state if name in mapped}


def _fitted(entry: TensorEntry, name: str, expected: torch.Tensor) -> TensorEntry:
    shape = tuple(expected.shape)
    if entry.dtype in DTYPES:
        fits = entry.shape == shape and DTYPES[entry.dtype].is_floating_point == expected.is_floating_point()
    else:
        fits = prod(entry.shape) == prod(shape)  # GGUF drops extents of 1 and transposes, decode checks the result
    if not fits:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.stored_name} is {entry.dtype} {list(entry.shape)}, the model expects "
            f"{expected.dtype} {list(shape)}; config.json belongs to another model, or the weights are packed"
        )
    return replace(entry, name=name, shape=shape)


def _as_tensor(entry: TensorEntry, data: bytearray) -> torch.Tensor:
    if not data:
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


def _identity(url: str, layout: Layout) -> str:
    """sha256 over the configuration and, per file, its relative name, size, header and three samples of its data."""
    samples = [sample for file, size in sorted(layout.sizes.items()) for sample in _samples(file, size)]
    digest = hashlib.sha256(layout.config_json.encode())
    for file, size in sorted(layout.sizes.items()):
        digest.update(f"\0{file}\0{size}\0".encode())
        digest.update(layout.headers[file])
    for content in fetch(url, samples):
        digest.update(content)
    return digest.hexdigest()


def _samples(file: str, size: int) -> list[ByteRange]:
    length = min(_SAMPLE_BYTES, size)
    return [ByteRange(file, start, start + length) for start in (0, (size - length) // 2, size - length)]
