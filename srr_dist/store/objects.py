"""Objects in a folder, in memory or on S3, behind one small interface."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from srr_dist.errors import OutputError, StoreError
from srr_dist.store.backend import Backend
from srr_dist.store.documents import decode
from srr_dist.store.local import LocalFolder
from srr_dist.store.paths import check_path, check_sha256
from srr_dist.store.remote import open_remote

CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class FileEntry:
    """An object as records and manifests name it: path in its store, size in bytes, sha256 in hexadecimal."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        check_path(self.path)
        check_sha256(self.sha256)
        if self.size < 0:
            raise StoreError(f"file {self.path}: size {self.size} is negative")


class ObjectStore:
    """All objects under one URL: a local folder, ``memory://…``, ``s3://bucket/…`` or another fsspec URL.

    Objects appear whole or not at all and are named by relative POSIX paths (see srr_dist.store.paths). Instances can
    be pickled and may be shared by threads. Every failure is a StoreError that names the object; a URL that names a
    local file is an OutputError.
    """

    def __init__(self, url: str) -> None:
        self._backend, self.url = _open(url)

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        return ObjectStore, (self.url,)

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def location(self, path: str) -> str:
        """The object's full address, for messages and logs."""
        return f"{self.url}{path}" if self.url.endswith("/") else f"{self.url}/{path}"

    def get(self, path: str) -> bytes:
        """The whole object; StoreError if it is missing."""
        with self._errors("read", check_path(path)):
            return self._backend.read(path)

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """Exactly the bytes [start, stop), 0 <= start <= stop; StoreError if the object is missing or ends before."""
        if not 0 <= start <= stop:
            raise StoreError(f"{self.location(path)}: byte range {start}..{stop} is none")
        with self._errors("read", check_path(path)):
            # S3 has no empty ranges.
            data = self._backend.read(path, start, stop) if start < stop else b""
        if len(data) != stop - start:
            raise StoreError(f"{self.location(path)}: bytes {start}..{stop} expected, but only {len(data)} are there")
        return data

    def get_json(self, path: str) -> Any:
        """The object's JSON value; StoreError if it is missing or no valid JSON."""
        return decode(self.get(path), self.location(path))

    def exists(self, path: str) -> bool:
        """Whether there is such an object; a folder is none."""
        with self._errors("looked up", check_path(path)):
            return self._backend.size(path) is not None

    def size(self, path: str) -> int:
        """Bytes in the object; StoreError if it is missing."""
        with self._errors("looked up", check_path(path)):
            size = self._backend.size(path)
        if size is None:
            raise StoreError(f"{self.location(path)}: no such object")
        return size

    def put(self, path: str, data: bytes) -> None:
        """Create or replace the object."""
        with self._errors("written", check_path(path)):
            self._backend.put(path, data)

    def create(self, path: str, data: bytes) -> bool:
        """Create the object, unless it exists; returns whether it now is there with this very content.

        Of writers with different contents exactly one gets True. The content decides, because a write whose answer was
        lost is sent again and then meets its own object; put a nonce into what must have one writer.
        """
        with self._errors("created", check_path(path)):
            return self._backend.create(path, data) or self._backend.read(path) == data

    def upload(self, local: Path, path: str) -> FileEntry:
        """Create or replace the object by a local file; returns size and sha256 of the bytes sent."""
        with self._errors(f"written from {local}", check_path(path)):
            size, sha256 = self._backend.upload(local, path)
        if (found := self.size(path)) != size:
            raise StoreError(f"{self.location(path)}: {size} bytes sent, {found} stored; upload it again")
        return FileEntry(path, size, sha256)

    def copy(self, source: str, target: str) -> None:
        """Create or replace ``target`` by ``source`` on the server; in a folder the two then share one file."""
        with self._errors(f"copied to {check_path(target)}", check_path(source)):
            self._backend.copy(source, target)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Path -> size of every object below the folder ``prefix`` ("": of all), sorted; {} if there is none."""
        with self._errors("listed", check_path(prefix) if prefix else ""):
            return self._backend.list(prefix)

    def delete(self, path: str) -> None:
        """Remove the object if it is there."""
        with self._errors("deleted", check_path(path)):
            self._backend.delete(path)

    def delete_tree(self, prefix: str) -> None:
        """Remove every object below the folder ``prefix``, which must not be empty."""
        with self._errors("deleted", check_path(prefix)):
            self._backend.delete_tree(prefix)

    def sha256(self, path: str) -> str:
        """Hexadecimal sha256 of the stored bytes, read in pieces."""
        digest, size = hashlib.sha256(), self.size(path)
        for start in range(0, size, CHUNK_BYTES):
            digest.update(self.get_range(path, start, min(start + CHUNK_BYTES, size)))
        return digest.hexdigest()

    def probe(self, folder: str) -> None:
        """Prove that ``create`` never replaces an object here, by trying it in ``folder``; StoreError if it does."""
        path = f"{folder}/probe-{uuid.uuid4().hex}"
        try:
            honoured = self.create(path, b"first") and not self.create(path, b"second")
        finally:
            self.delete(path)
        if not honoured:
            raise StoreError(
                f"{self.url}: the server replaces objects in spite of If-None-Match, so two runs could destroy each "
                "other's work; use a server with conditional writes"
            )

    @contextmanager
    def _errors(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise StoreError(f"{self.location(path)} cannot be {action}: not found ({error})") from error
        except Exception as error:  # every filesystem brings exception types of its own
            raise StoreError(f"{self.location(path)} cannot be {action}: {type(error).__name__}: {error}") from error


def _open(url: str) -> tuple[Backend, str]:
    """The backend, and the URL that names the same place from any working directory."""
    if "://" not in url or urlsplit(url).scheme in {"file", "local"}:
        root = Path(url.partition("://")[2] or url).expanduser().absolute()
        if root.exists() and not root.is_dir():
            raise OutputError(f"{root}: a file, expected a folder or nothing yet; name another location")
        return LocalFolder(root), str(root)
    try:
        return open_remote(url), url
    except (ValueError, ImportError) as error:
        raise OutputError(
            f"{url}: no such kind of storage ({error}); use a folder, s3://bucket/… or memory://…"
        ) from error
