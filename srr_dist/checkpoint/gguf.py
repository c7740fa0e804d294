"""A GGUF file as transformers would load it, but one tensor at a time.

The configuration, the tokenizer, the names and the layouts are transformers' own; this module gives them the file's
header and, tensor by tensor, its dequantized values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import quant_shape_to_byte_shape
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    GGUF_SUPPORTED_ARCHITECTURES,
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from srr_dist.checkpoint.location import ByteRange, fetch, file_size, is_local
from srr_dist.checkpoint.skeleton import MAX_BLOCKS, build_skeleton, parse_config
from srr_dist.checkpoint.tensors import Layout, TensorEntry
from srr_dist.errors import CheckpointError

SUFFIX = ".gguf"

_DTYPE_PREFIX = "GGUF:"
_FIRST_BYTES = 16 * 1024 * 1024  # holds the header of most files, whose bulk is the vocabulary
_MAX_HEADER_BYTES = 512 * 1024 * 1024
_MAX_READS = 8_000_000  # some ten for each token of the largest vocabularies


def read_layout(url: str) -> Layout:
    """Everything the GGUF file ``url`` says before its tensors are read.

    Raises:
        CheckpointError: the file is damaged, truncated or of an architecture or type transformers cannot load.
    """
    size = file_size(url)
    with _header_file(url, size) as path:
        reader = _parse(path)
        architecture = _architecture(reader)
        config_json = _config_json(path)
        data_start = int(reader.data_offset)
        stored = list(reader.tensors)
    skeleton = build_skeleton(parse_config(config_json), torch.float32)
    names = _state_names(skeleton, architecture)
    entries = tuple(_entry(tensor, names.get(tensor.name, tensor.name), size) for tensor in stored)
    _refuse_merged(entries)
    (header,) = fetch(url, [ByteRange("", 0, data_start)])
    return Layout(config_json, {"": size}, {"": bytes(header)}, entries, architecture)


def decode(entry: TensorEntry, data: bytearray, architecture: str, config: PretrainedConfig) -> torch.Tensor:
    """The float32 tensor in the model's layout that the bytes ``data`` of ``entry`` stand for.

    Raises:
        CheckpointError: its shape is not the model's.
    """
    kind = GGMLQuantizationType[entry.dtype.removeprefix(_DTYPE_PREFIX)]
    rows = np.frombuffer(data, dtype=np.uint8).reshape(quant_shape_to_byte_shape(entry.stored_shape, kind))
    values = dequantize(rows, kind)
    result = _processor(architecture, config).process(values, entry.stored_name)
    if tuple(result.weights.shape) != entry.shape:
        raise CheckpointError(
            f"tensor {entry.stored_name}: transformers makes it {list(result.weights.shape)}, the model expects "
            f"{list(entry.shape)}; this file cannot be loaded"
        )
    return torch.from_numpy(np.ascontiguousarray(result.weights, dtype=np.float32))


def companions(url: str) -> dict[str, bytes]:
    """File name -> content of the tokenizer that transformers derives from the header."""
    with _header_file(url, file_size(url)) as path, TemporaryDirectory(prefix="srr-tokenizer-") as folder:
        try:
            with _bounded_reading():
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except Exception as error:  # each tokenizer conversion fails in its own way
            raise CheckpointError(f"{url}: transformers cannot derive its tokenizer: {error}") from error
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


@contextmanager
def _header_file(url: str, size: int) -> Iterator[Path]:
    """A local file with the length and the header of ``url``; a remote file's tensors are a hole in it."""
    if is_local(url):
        yield Path(url)
        return
    with TemporaryDirectory(prefix="srr-gguf-") as folder:
        path = Path(folder) / f"header{SUFFIX}"
        prefix = min(_FIRST_BYTES, size)
        while not _holds_header(path, url, prefix, size):
            prefix = min(4 * prefix, size)
        yield path


def _holds_header(path: Path, url: str, prefix: int, size: int) -> bool:
    """Write the first ``prefix`` bytes of ``url`` to ``path``, a file of ``size`` bytes; are they the whole header?

    Nothing in the file announces the length of its header, so a reader tells, or fails in the zeros that follow.
    """
    (content,) = fetch(url, [ByteRange("", 0, prefix)])
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    try:
        return bool(_parse(path).data_offset <= prefix)
    except CheckpointError:
        if prefix == size or prefix >= _MAX_HEADER_BYTES:
            raise
        return False


class _BoundedReader(GGUFReader):
    """gguf's reader held to the bytes that are there, and several times faster.

    By itself it follows any count in the header without end, and takes each of the hundred thousands of values of a
    vocabulary as a slice of a ``numpy.memmap``, which is slow.
    """

    _reads = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self._reads += 1
        kind, count = np.dtype(dtype), int(count)
        stop = int(offset) + kind.itemsize * count
        if stop > self.data.nbytes or self._reads > _MAX_READS:
            raise ValueError(f"bytes {int(offset)} to {stop} of {self.data.nbytes} are one of {self._reads} values")
        order = self.byte_order if override_order is None else override_order
        return np.ndarray(count, kind if order == "I" else kind.newbyteorder(order), self.data, int(offset))


@contextmanager
def _bounded_reading() -> Iterator[None]:
    """Lend transformers our reader: it parses a header anew, with that of gguf, for whatever is asked of it."""
    gguf.GGUFReader = _BoundedReader  # type: ignore[misc]
    try:
        yield
    finally:
        gguf.GGUFReader = GGUFReader  # type: ignore[misc]


def _architecture(reader: GGUFReader) -> str:
    """``general.architecture``, once transformers can load it and the number of blocks is one that a model can have."""

    def field(name: str) -> Any:
        try:
            return reader.fields[name].contents()
        except (KeyError, IndexError, UnicodeDecodeError):
            return None

    architecture = field("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise CheckpointError(f"GGUF architecture {architecture!r} is not one that transformers loads")
    blocks = field(f"{architecture}.block_count")
    if not isinstance(blocks, int) or not 0 < blocks <= MAX_BLOCKS:
        raise CheckpointError(f"GGUF {architecture}.block_count is {blocks!r}, expected a number up to {MAX_BLOCKS}")
    return architecture


def _parse(path: Path) -> GGUFReader:
    try:
        return _BoundedReader(path)
    except Exception as error:  # the reader indexes into whatever the bytes say
        raise CheckpointError(f"not a readable GGUF file, or truncated ({error}); fetch it again") from error


def _config_json(path: Path) -> str:
    try:
        with _bounded_reading():
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the mapping indexes into whatever the header says
        raise CheckpointError(f"transformers cannot derive a configuration from the header: {error!r}") from error
    config.dtype = torch.float32  # what dequantized weights are; the file says nothing of the original
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None:
        config.architectures = [model_class.__name__]  # servers choose the class by it
    return str(config.to_json_string())


@dataclass(frozen=True)
class _NamedModule:
    """What transformers' name mapping asks of a model, with the children it shall visit.

    For every module visited it builds gguf's name table anew, in time that grows with the number of blocks; visiting
    all modules would take minutes for a deep model, and the model and its base model are enough.
    """

    module: PreTrainedModel
    children: tuple[tuple[str, _NamedModule], ...] = ()

    @property
    def config(self) -> PretrainedConfig:
        return self.module.config

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

    def named_children(self) -> tuple[tuple[str, _NamedModule], ...]:
        return self.children


def _state_names(skeleton: PreTrainedModel, architecture: str) -> dict[str, str]:
    """GGUF name -> state-dict name, by transformers' own mapping."""
    base = cast(PreTrainedModel, skeleton.base_model)
    model = _NamedModule(skeleton, ((skeleton.base_model_prefix, _NamedModule(base)),))
    names: dict[str, str] = get_gguf_hf_weights_map(model, _processor(architecture, skeleton.config))
    return names


def _processor(architecture: str, config: PretrainedConfig) -> Any:
    processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    return processor(config=config.to_dict())


def _entry(tensor: Any, name: str, size: int) -> TensorEntry:
    kind = tensor.tensor_type
    start, stop = int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)
    if stop > size:
        raise CheckpointError(f"tensor {tensor.name} ends at byte {stop}, the file has {size}; fetch it again")
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError as error:
        raise CheckpointError(f"tensor {tensor.name} has the type {kind.name}, which gguf cannot dequantize") from error
    shape = tuple(int(extent) for extent in reversed(tensor.shape))
    return TensorEntry(name, "", start, stop, shape, f"{_DTYPE_PREFIX}{kind.name}", tensor.name, shape)


def _refuse_merged(entries: tuple[TensorEntry, ...]) -> None:
    seen: dict[str, str] = {}
    for entry in entries:
        if entry.name in seen:
            raise CheckpointError(
                f"tensors {seen[entry.name]} and {entry.stored_name} are merged into {entry.name} by the model; "
                "GGUF files of mixture-of-experts models are not supported"
            )
        seen[entry.name] = entry.stored_name
