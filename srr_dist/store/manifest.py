"""What a finished output consists of, and the mark that it is finished."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from srr_dist.errors import OutputError, StoreError
from srr_dist.store.documents import build, decode, encode, parse
from srr_dist.store.objects import FileEntry, ObjectStore
from srr_dist.store.paths import check_fingerprint, check_sha256

MANIFEST = "manifest.json"
COMMIT = "COMMIT"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Everything in an output: equal runs give equal bytes, so it holds no time, host or address.

    ``created_by``: package -> version. ``exports``: folders written, such as "base" and "adapter". ``files``: path ->
    entry of every file but manifest.json and COMMIT. ``unquantized``: full names of the linears left as they were.
    ``layers``: full name of a quantized linear -> what was chosen for it (``k``, ``rank``, ``bits``, …).
    """

    fingerprint: str
    created_by: dict[str, str]
    exports: list[str]
    files: dict[str, FileEntry]
    unquantized: list[str]
    layers: dict[str, dict[str, Any]]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_fingerprint(self.fingerprint)
        for path, entry in self.files.items():
            if path != entry.path:
                raise StoreError(f"files: the entry of {path!r} names {entry.path!r}")
            if path in {MANIFEST, COMMIT}:
                raise StoreError(f"files: {path!r} cannot describe itself")

    def to_json(self) -> bytes:
        """Canonical bytes; in ``files`` the path is the key alone."""
        files = {path: {"size": entry.size, "sha256": entry.sha256} for path, entry in self.files.items()}
        return encode({**vars(self), "files": files}, MANIFEST)

    @staticmethod
    def from_json(data: bytes, source: str = MANIFEST) -> Manifest:
        """The manifest in ``data``; StoreError with ``source`` and field if there is none, or of another version."""
        document = decode(data, source)
        if not isinstance(document, dict):
            raise StoreError(f"{source}: expected a JSON object, found {type(document).__name__}")
        if (version := document.get("format_version")) != FORMAT_VERSION:
            raise StoreError(
                f"{source}: format version {version!r}, expected {FORMAT_VERSION}; use the srr_dist that wrote it"
            )
        files = document.get("files")
        if isinstance(files, dict):
            document["files"] = {
                path: {**entry, "path": path} if isinstance(entry, dict) else entry for path, entry in files.items()
            }
        return build(Manifest, document, source)


@dataclass(frozen=True)
class _Commit:
    manifest_sha256: str

    def __post_init__(self) -> None:
        check_sha256(self.manifest_sha256)


def write_commit(store: ObjectStore, manifest: Manifest) -> None:
    """Write manifest.json, then COMMIT; call it when every file that the manifest names is there.

    It may be repeated. While an earlier manifest is replaced, readers find the output unfinished, never mixed.
    """
    data = manifest.to_json()
    commit = _Commit(hashlib.sha256(data).hexdigest())
    store.put(MANIFEST, data)
    store.put(COMMIT, encode(commit, COMMIT))


def read_complete(store: ObjectStore) -> Manifest:
    """The manifest of a finished output.

    Raises:
        OutputError: there is no COMMIT, or it belongs to another manifest: the output is unfinished.
        StoreError: COMMIT or manifest.json is damaged or cannot be read.
    """
    if not store.exists(COMMIT):
        raise OutputError(f"{store.url}: no {COMMIT}, so this is not a finished output; repeat the run to finish it")
    commit = parse(_Commit, store.get(COMMIT), store.location(COMMIT))
    data = store.get(MANIFEST)
    if (found := hashlib.sha256(data).hexdigest()) != commit.manifest_sha256:
        raise OutputError(
            f"{store.location(MANIFEST)}: {COMMIT} expects sha256 {commit.manifest_sha256}, found {found}; "
            "the output was not finished or was changed afterwards; repeat the run to finish it"
        )
    return Manifest.from_json(data, store.location(MANIFEST))
