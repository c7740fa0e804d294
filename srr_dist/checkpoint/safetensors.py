"""The header of a safetensors file, checked in full before anything in it is believed.

Format: 8 bytes little-endian header length n, n bytes of JSON, then the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from math import prod
from typing import Any

from srr_dist.checkpoint.location import ByteRange, fetch, list_files
from srr_dist.checkpoint.tensors import DTYPES, Layout, TensorEntry
from srr_dist.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LENGTH_BYTES = 8
_SPECULATIVE_BYTES = 256 * 1024  # covers the headers of most shards, so that one request per shard is enough
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def read_layout(url: str) -> Layout:
    """Everything the folder ``url`` says about its weights: one model.safetensors, or an index and its shards.

    Raises:
        CheckpointError: no configuration or no safetensors weights, a missing shard, an index that names a tensor
            its shard lacks, or a damaged header.
    """
    listing = list_files(url)
    if "config.json" not in listing:
        raise CheckpointError("no config.json; expected a transformers checkpoint folder")
    if SINGLE in listing:
        index: dict[str, str] = {}
        files = [SINGLE]
    elif INDEX in listing:
        index = _read_index(url, listing)
        files = sorted(set(index.values()))
    else:
        raise _no_weights(listing)
    for file in files:
        if file not in listing:
            raise CheckpointError(f"shard {file} is named by {INDEX} but missing; fetch it again")
    sizes = {file: listing[file] for file in files}
    headers = _read_headers(url, sizes)
    entries = tuple(e for file, size in sizes.items() for e in parse_header(file, size, headers[file]))
    found: dict[str, str] = {}
    for entry in entries:
        if (other := found.setdefault(entry.name, entry.file)) != entry.file:
            raise CheckpointError(f"tensor {entry.name} is in {other} and in {entry.file}; fetch the checkpoint again")
    for name, file in index.items():
        if found.get(name) != file:
            raise CheckpointError(f"{INDEX} places tensor {name} in {file}, which lacks it; fetch both again")
    return Layout(_read_text(url, "config.json", listing), sizes, headers, entries)


def _no_weights(listing: dict[str, int]) -> CheckpointError:
    pickled = sorted(name for name in listing if name.endswith((".bin", ".pt", ".pth")))
    if pickled:
        return CheckpointError(
            f"only pickled weights ({pickled[0]}); convert them with transformers' save_pretrained, "
            "which writes safetensors"
        )
    return CheckpointError(f"neither {SINGLE} nor {INDEX} among its {len(listing)} files")


def _read_text(url: str, file: str, listing: dict[str, int]) -> str:
    (content,) = fetch(url, [ByteRange(file, 0, listing[file])])
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 at byte {error.start}") from error


def _read_index(url: str, listing: dict[str, int]) -> dict[str, str]:
    """Tensor name -> shard."""
    try:
        index = json.loads(_read_text(url, INDEX, listing))
        return {str(name): str(file) for name, file in index["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{INDEX}: expected JSON with a weight_map of tensor -> shard ({error!r})") from error


def _read_headers(url: str, sizes: dict[str, int]) -> dict[str, bytes]:
    """The header JSON of each file in ``sizes`` (name -> size in bytes) under ``url``.

    Raises:
        CheckpointError: a file is too short to hold the header it announces, or the header is over the limit.
    """
    first = {file: min(size, _SPECULATIVE_BYTES) for file, size in sizes.items()}
    starts = dict(zip(sizes, fetch(url, [ByteRange(file, 0, stop) for file, stop in first.items()]), strict=True))
    stops = {file: _header_stop(file, sizes[file], bytes(start[:_LENGTH_BYTES])) for file, start in starts.items()}
    longer = [ByteRange(file, first[file], stop) for file, stop in stops.items() if stop > first[file]]
    for rest, more in zip(longer, fetch(url, longer), strict=True):
        starts[rest.file] += more
    return {file: bytes(start[_LENGTH_BYTES : stops[file]]) for file, start in starts.items()}


def _header_stop(file: str, size: int, length: bytes) -> int:
    stop = _LENGTH_BYTES + int.from_bytes(length, "little")
    if len(length) < _LENGTH_BYTES or stop > size:
        raise CheckpointError(f"{file}: {size} bytes are too few for its header ({stop} bytes); fetch the file again")
    if stop > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{file}: header of {stop} bytes is above the format's limit of {_MAX_HEADER_BYTES}")
    return stop


def parse_header(file: str, size: int, header: bytes) -> list[TensorEntry]:
    """The tensors of one file, in the order of their bytes.

    Args:
        file: its name, for the entries and messages.
        size: of the whole file in bytes.
        header: the JSON.

    Raises:
        CheckpointError: the JSON is invalid, a dtype unsupported, a tensor's byte count differs from its shape and
            dtype, tensors overlap or leave gaps, or the file is truncated or longer than its tensors.
    """
    data_start = _LENGTH_BYTES + len(header)
    entries = [
        _entry(file, data_start, name, description)
        for name, description in _json_object(file, header).items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    position = data_start
    for entry in entries:
        if entry.start != position:
            raise CheckpointError(
                f"{file}: tensor {entry.name} starts at byte {entry.start}, expected {position}; its neighbour "
                "overlaps it or leaves a gap, the header is damaged"
            )
        position = entry.stop
    if position != size:
        state = "truncated" if size < position else "followed by bytes of no tensor"
        raise CheckpointError(f"{file}: {state}: header ends at byte {position}, file has {size}; fetch it again")
    return entries


def _json_object(file: str, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            raise ValueError("a name occurs twice")
        return seen

    try:
        parsed = json.loads(header, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: header is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{file}: header is a JSON {type(parsed).__name__}, expected an object of tensors")
    return parsed


def _entry(file: str, data_start: int, name: str, description: Any) -> TensorEntry:
    match description:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)]} if all(
            type(extent) is int and extent >= 0 for extent in shape
        ):
            pass
        case _:
            raise CheckpointError(f"{file}: tensor {name} is described by {description!r}; the header is damaged")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{file}: tensor {name} has dtype {dtype}, supported are {', '.join(DTYPES)}; "
            "start from the unquantized checkpoint"
        )
    expected = prod(shape) * DTYPES[dtype].itemsize
    if start < 0 or stop - start != expected:
        raise CheckpointError(
            f"{file}: tensor {name} has bytes {start} to {stop}, expected {expected} bytes for {dtype} {shape}"
        )
    extents = tuple(shape)
    return TensorEntry(name, file, data_start + start, data_start + stop, extents, dtype, name, extents)
