"""Text and token files as one stream of documents, from a file, a folder, any fsspec URL or a `datasets` id."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from srr_dist.config import one_line
from srr_dist.errors import CalibrationError
from srr_dist.store.remote import open_filesystem

PIECE_BYTES = 64 * 1024
"""A plain text is handed out in pieces that end at the first line end after this many bytes."""

_FIELDS = ("text", "input_ids")
_DATASET_PARTS = 4


@dataclass(frozen=True)
class Document:
    """One document, or one piece of a long plain text."""

    origin: str
    """File and line, for messages."""
    content: str | list[int]
    """Text, or token ids that are taken as they are."""


def read_documents(source: str) -> Iterator[Document]:
    """The documents of ``source`` in order, read as they are asked for.

    Args:
        source: a .txt file (one document), a .jsonl or .parquet file with a ``text`` or ``input_ids`` field per row, a
            folder of such files (sorted by name; other files are skipped), an fsspec URL of either, or
            ``path:config:split:column`` for the `datasets` library (an empty config is the default one).

    Raises:
        CalibrationError: nothing there, an unknown extension, bytes that are not UTF-8, or a row without the field.
    """
    is_path = "://" in source or Path(source).exists()
    if not is_path and source.count(":") == _DATASET_PARTS - 1:
        yield from _read_dataset(source)
        return
    try:
        filesystem, root = open_filesystem(source)
        is_folder = filesystem.info(root)["type"] == "directory"
        paths = sorted(filesystem.find(root, maxdepth=1)) if is_folder else [root]
    except Exception as error:  # every fsspec backend has its own exceptions
        raise CalibrationError(
            f"{source}: cannot be found ({type(error).__name__}: {error}); expected a file, a folder, a URL or "
            "a datasets id path:config:split:column"
        ) from error
    known = [path for path in paths if PurePosixPath(path).suffix in _READERS]
    if not known:
        found = f"none of its {len(paths)} files ends" if is_folder else "its name does not end"
        raise CalibrationError(f"{source}: {found} in one of {', '.join(_READERS)}")
    for path in known:
        with filesystem.open(path, "rb") as file:
            yield from _READERS[PurePosixPath(path).suffix](path, file)


def _read_text(path: str, file: IO[bytes]) -> Iterator[Document]:
    offset = 0
    piece = bytearray()
    for line in file:
        piece += line
        if len(piece) >= PIECE_BYTES:
            yield Document(path, _decode(path, offset, bytes(piece)))
            offset += len(piece)
            piece.clear()
    if piece:
        yield Document(path, _decode(path, offset, bytes(piece)))


def _decode(path: str, offset: int, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: byte {offset + error.start} is not UTF-8 ({error.reason}); convert the file"
        ) from error


def _read_jsonl(path: str, file: IO[bytes]) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(file, start=1):
        origin = f"{path}, line {number}"
        text = _decode(path, offset, line)
        offset += len(line)
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{origin}: not valid JSON ({error})") from error
        yield _row_document(origin, row)


def _row_document(origin: str, row: Any) -> Document:
    match row:
        case {"text": str(text)}:
            return Document(origin, text)
        case {"input_ids": list(ids)} if all(type(token) is int for token in ids):
            return Document(origin, ids)
    raise CalibrationError(f"{origin}: expected a string field 'text' or a list of integers 'input_ids'")


def _read_parquet(path: str, file: IO[bytes]) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CalibrationError(f"{path}: reading parquet needs pyarrow; pip install 'srr_dist[data]'") from error
    try:
        table = parquet.ParquetFile(file)
        column = next((name for name in _FIELDS if name in table.schema_arrow.names), None)
        if column is None:
            raise CalibrationError(f"{path}: has columns {table.schema_arrow.names}, expected one of {_FIELDS}")
        number = 0
        for batch in table.iter_batches(columns=[column]):
            for row in batch.to_pylist():
                number += 1
                yield _row_document(f"{path}, row {number}", row)
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{path}: not a readable parquet file ({error})") from error


def _read_dataset(source: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"{source}: not a file, and reading it as a datasets id needs that library; pip install 'srr_dist[data]'"
        ) from error
    path, config, split, column = source.split(":")
    number = 0
    try:
        for row in datasets.load_dataset(path, config or None, split=split, streaming=True):
            number += 1
            content = row.get(column)
            field = "text" if isinstance(content, str) else "input_ids"
            yield _row_document(f"{source}, row {number}, column {column}", {field: content})
    except CalibrationError:
        raise
    except Exception as error:  # the library's own, its readers' and those of the hub
        raise CalibrationError(
            f"{source}: cannot be read as a datasets id path:config:split:column, after {number} rows "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


_READERS: dict[str, Callable[[str, IO[bytes]], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
