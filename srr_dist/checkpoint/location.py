"""Where a checkpoint lies and how its bytes are fetched: listings and ranges through fsspec, nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from huggingface_hub import HfApi

from srr_dist.errors import CheckpointError, StoreError
from srr_dist.store.patience import patiently
from srr_dist.store.remote import is_transient, open_filesystem

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_MERGE_GAP = 64 * 1024  # bytes worth reading through rather than paying another request for
_REQUEST_BYTES = 32 * 1024 * 1024  # one request; object stores give their bandwidth to parallel requests
_REQUESTS_IN_FLIGHT = 16


@dataclass(frozen=True)
class ByteRange:
    """Bytes ``start`` to ``stop`` (exclusive) of ``file``, a path relative to a URL; "" is the URL itself."""

    file: str
    start: int
    stop: int


def resolve(model: str, revision: str | None) -> str:
    """The fsspec URL of what the user wrote: a URL, a local path or a hub id ``org/name``.

    A hub id becomes an ``hf://`` URL pinned to the commit that ``revision`` (default: the main branch) names now, so
    that every worker reads the same bytes.

    Raises:
        CheckpointError: neither a URL nor an existing path nor a hub id, an unknown hub id or revision, or a
            ``revision`` given for something that has none.
    """
    model = model.removeprefix("file://")
    is_url = "://" in model
    if not is_url and not Path(model).exists() and _HUB_ID.fullmatch(model):
        return f"hf://{model}@{_hub_commit(model, revision)}"
    if revision is not None:
        raise CheckpointError(f"{model}: revision {revision!r} given, but only hub ids have revisions; leave it out")
    if is_url:
        return model.rstrip("/")
    if not Path(model).exists():
        raise CheckpointError(f"{model}: no such file or folder, and not a hub id of the form org/name; check the path")
    return str(Path(model).resolve())


def _hub_commit(repository: str, revision: str | None) -> str:
    try:
        return str(HfApi().model_info(repository, revision=revision).sha)
    except Exception as error:  # its HTTP library's own too, which are no OSError
        raise CheckpointError(
            f"{repository} (revision {revision or 'main'}): not a local path, and the hub answered: {error}; "
            "check the spelling, the network and, for gated models, that HF_TOKEN is set"
        ) from error


def is_local(url: str) -> bool:
    """Whether ``url`` is a plain path of this machine."""
    return "://" not in url


def list_files(url: str) -> dict[str, int]:
    """File names directly in the folder ``url``, with their sizes in bytes.

    Raises:
        CheckpointError: the folder does not exist or cannot be reached.
    """
    try:
        filesystem, root = open_filesystem(url)
        entries = filesystem.ls(root, detail=True)
    except Exception as error:  # every fsspec backend has its own exceptions
        raise _unreachable(url, error) from error
    if [entry["name"].rstrip("/") for entry in entries] == [root.rstrip("/")]:
        raise CheckpointError("is a file; expected a folder with config.json and safetensors, or a .gguf file")
    return {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries if entry["type"] == "file"}


def file_size(url: str) -> int:
    """Size in bytes of the file ``url``.

    Raises:
        CheckpointError: the file does not exist or cannot be reached.
    """
    try:
        filesystem, path = open_filesystem(url)
        return int(filesystem.size(path))
    except Exception as error:  # every fsspec backend has its own exceptions
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot reach {url}: {type(error).__name__}: {error}; check the spelling, the network and the credentials"
    )


def fetch(url: str, ranges: Sequence[ByteRange]) -> list[bytearray]:
    """The bytes of ``ranges`` under ``url``, in the order given.

    Neighbouring ranges share requests, long ones are split into parallel requests, and beyond the result itself at
    most ``_REQUESTS_IN_FLIGHT * _REQUEST_BYTES`` bytes are held. Requests that fail for the moment are made again for a
    while; listings and sizes, which come first and find a wrong address, are not.

    Raises:
        CheckpointError: a file is shorter than a range, is gone, or may not be read.
        StoreError: the server does not answer.
    """
    filesystem, root = open_filesystem(url)
    buffers = [bytearray(wanted.stop - wanted.start) for wanted in ranges]
    requests = _requests(ranges)

    def get(request: ByteRange) -> bytes:
        path = f"{root}/{request.file}" if request.file else root
        read = partial(filesystem.cat_file, path, start=request.start, end=request.stop)
        return bytes(patiently(read, is_transient, path))

    # Threads and not cat_ranges, which the hub's filesystem, for one, would serve one after the other.
    with ThreadPoolExecutor(_REQUESTS_IN_FLIGHT) as pool:
        while wave := list(islice(requests, _REQUESTS_IN_FLIGHT)):
            try:
                parts = list(pool.map(get, [request for request, _ in wave]))
            except FileNotFoundError as error:
                raise CheckpointError(f"{url}: a file is gone ({error}); it must stay in place during a run") from error
            except Exception as error:  # every fsspec backend has its own exceptions
                if is_transient(error):
                    raise StoreError(
                        f"{url} cannot be read: {type(error).__name__}: {error}; try again later"
                    ) from error
                raise _unreachable(url, error) from error
            for (request, served), part in zip(wave, parts, strict=True):
                _check_length(url, request, part)
                for index in served:
                    _copy_overlap(request, part, ranges[index], buffers[index])
    return buffers


def _check_length(url: str, request: ByteRange, part: bytes) -> None:
    if len(part) != request.stop - request.start:
        raise CheckpointError(
            f"{url}/{request.file}: expected {request.stop - request.start} bytes at offset {request.start}, "
            f"found {len(part)}; the file is truncated or changed while it was read"
        )


def _requests(ranges: Sequence[ByteRange]) -> Iterator[tuple[ByteRange, list[int]]]:
    """Requests that cover ``ranges``, each with the indices of the ranges it serves a part of."""
    order = sorted(
        (i for i, r in enumerate(ranges) if r.stop > r.start), key=lambda i: (ranges[i].file, ranges[i].start)
    )
    run: list[int] = []
    for index in order:
        if run and not _neighbours(ranges[run[-1]], ranges[index]):
            yield from _split(ranges, run)
            run = []
        run.append(index)
    if run:
        yield from _split(ranges, run)


def _neighbours(left: ByteRange, right: ByteRange) -> bool:
    return left.file == right.file and right.start - left.stop <= _MERGE_GAP


def _split(ranges: Sequence[ByteRange], run: list[int]) -> Iterator[tuple[ByteRange, list[int]]]:
    file, end = ranges[run[0]].file, max(ranges[i].stop for i in run)
    for start in range(ranges[run[0]].start, end, _REQUEST_BYTES):
        stop = min(start + _REQUEST_BYTES, end)
        yield ByteRange(file, start, stop), [i for i in run if ranges[i].start < stop and ranges[i].stop > start]


def _copy_overlap(request: ByteRange, part: bytes, wanted: ByteRange, buffer: bytearray) -> None:
    start, stop = max(request.start, wanted.start), min(request.stop, wanted.stop)
    buffer[start - wanted.start : stop - wanted.start] = memoryview(part)[start - request.start : stop - request.start]
