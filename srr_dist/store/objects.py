"""Objects in a folder, in memory or on S3, behind one small interface."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from srr_dist.errors import OutputError, StoreError
from srr_dist.store.backend import Backend
from srr_dist.store.documents import decode
from srr_dist.store.local import LocalFolder
from srr_dist.store.paths import check_path, check_sha256
from srr_dist.store.patience import patiently
from srr_dist.store.remote import open_remote

CHUNK_BYTES = 16 * 2**20

T = TypeVar("T")


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
    be pickled and may be shared by threads. Requests that fail for the moment (no connection, an overloaded server) are
    made again for a while; every failure that stays is a StoreError that names the object. A URL that names a local
    file is an OutputError.

    ``single_driver`` lets a server without conditional writes be used: ``create`` and ``replace`` then look before they
    write, which is right only while nobody else writes the same objects.
    """

    def __init__(self, url: str, single_driver: bool = False) -> None:
        self._backend, self.url = _open(url, single_driver)
        self.single_driver = single_driver

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str, bool]]:
        return ObjectStore, (self.url, self.single_driver)

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def location(self, path: str) -> str:
        """The object's full address, for messages and logs."""
        return f"{self.url}{path}" if self.url.endswith("/") else f"{self.url}/{path}"

    def get(self, path: str) -> bytes:
        """The whole object; StoreError if it is missing."""
        return self._request("read", path, partial(self._backend.read, check_path(path)))

    def get_range(self, path: str, start: int, stop: int) -> bytes:
        """Exactly the bytes [start, stop), 0 <= start <= stop; StoreError if the object is missing or ends before."""
        if not 0 <= start <= stop:
            raise StoreError(f"{self.location(path)}: byte range {start}..{stop} is none")
        read = partial(self._backend.read, check_path(path), start, stop)
        data = self._request("read", path, read) if start < stop else b""  # S3 has no empty ranges
        if len(data) != stop - start:
            raise StoreError(f"{self.location(path)}: bytes {start}..{stop} expected, but only {len(data)} are there")
        return data

    def get_json(self, path: str) -> Any:
        """The object's JSON value; StoreError if it is missing or no valid JSON."""
        return decode(self.get(path), self.location(path))

    def exists(self, path: str) -> bool:
        """Whether there is such an object; a folder is none."""
        return self._request("looked up", path, partial(self._backend.size, check_path(path))) is not None

    def size(self, path: str) -> int:
        """Bytes in the object; StoreError if it is missing."""
        size = self._request("looked up", path, partial(self._backend.size, check_path(path)))
        if size is None:
            raise StoreError(f"{self.location(path)}: no such object")
        return size

    def put(self, path: str, data: bytes) -> None:
        """Create or replace the object."""
        self._request("written", path, partial(self._backend.put, check_path(path), data))

    def create(self, path: str, data: bytes) -> bool:
        """Create the object, unless it exists; returns whether it now is there with this very content.

        Of writers with different contents exactly one gets True. The content decides, because a write whose answer was
        lost is sent again and then meets its own object; put a nonce into what must have one writer.
        """
        created = self._request("created", path, partial(self._backend.create, check_path(path), data))
        return created or self.get(path) == data

    def replace(self, path: str, old: bytes, new: bytes) -> bool:
        """Replace the object if it holds exactly ``old``; returns whether it now holds ``new``.

        Of writers with different contents that replace the same ``old`` exactly one gets True; as for ``create``, put
        a nonce into them. For small objects that are written by ``create`` and ``replace`` alone.
        """

        def attempt() -> bool:
            try:
                found, version = self._backend.read_versioned(path)
            except FileNotFoundError:
                return False
            return found == new or (found == old and self._backend.replace(path, new, version))

        return self._request("replaced", check_path(path), attempt) or (self.exists(path) and self.get(path) == new)

    def upload(self, local: Path, path: str) -> FileEntry:
        """Create or replace the object by a local file; returns size and sha256 of the bytes sent."""
        upload = partial(self._backend.upload, local, check_path(path))
        size, sha256 = self._request(f"written from {local}", path, upload)
        if (found := self.size(path)) != size:
            raise StoreError(f"{self.location(path)}: {size} bytes sent, {found} stored; upload it again")
        return FileEntry(path, size, sha256)

    def copy(self, source: str, target: str) -> None:
        """Create or replace ``target`` by ``source`` on the server; in a folder the two then share one file."""
        copy = partial(self._backend.copy, check_path(source), check_path(target))
        self._request(f"copied to {target}", source, copy)

    def list(self, prefix: str = "") -> dict[str, int]:
        """Path -> size of every object below the folder ``prefix`` ("": of all), sorted; {} if there is none."""
        return self._request("listed", prefix, partial(self._backend.list, check_path(prefix) if prefix else ""))

    def delete(self, path: str) -> None:
        """Remove the object if it is there."""
        self._request("deleted", path, partial(self._backend.delete, check_path(path)))

    def delete_tree(self, prefix: str) -> None:
        """Remove every object below the folder ``prefix``, which must not be empty."""
        self._request("deleted", prefix, partial(self._backend.delete_tree, check_path(prefix)))

    def discard_unfinished(self, prefix: str = "") -> None:
        """Remove parts of uploads and temporary files that killed writers left below ``prefix`` ("": anywhere).

        An upload that is under way there fails.
        """
        discard = partial(self._backend.discard_unfinished, check_path(prefix) if prefix else "")
        self._request("cleared", prefix, discard)

    def sha256(self, path: str) -> str:
        """Hexadecimal sha256 of the stored bytes, read in pieces."""
        digest, size = hashlib.sha256(), self.size(path)
        for start in range(0, size, CHUNK_BYTES):
            digest.update(self.get_range(path, start, min(start + CHUNK_BYTES, size)))
        return digest.hexdigest()

    def probe(self, folder: str) -> None:
        """Prove that conditional writes keep their promises here, by trying them in ``folder``.

        Raises:
            StoreError: nothing can be written here at all, or a write is made though its condition does not hold.
        """
        path = f"{folder}/probe-{uuid.uuid4().hex}"
        self.put(path, b"first")
        try:
            _, version = self._backend.read_versioned(path)
            self.put(path, b"second")
            broken = self.create(path, b"third") or self._backend.replace(path, b"third", version)
            reason = "conditional writes replace objects in spite of their condition"
            sound = not broken and self.replace(path, b"second", b"third") and self.get(path) == b"third"
        except Exception as error:  # a server or filesystem may refuse them in any way
            sound, reason = False, f"conditional writes fail: {error}"
        finally:
            self.delete(path)
        if not sound:
            raise StoreError(
                f"{self.url}: {reason}. Two runs could destroy each other's work here; use a server that honours "
                "If-None-Match and If-Match, or, if no other run ever uses this output, --single-driver"
            )

    def _request(self, action: str, path: str, request: Callable[[], T]) -> T:
        """Make a request of the backend patiently, and say of a failure which object it is about."""
        try:
            return patiently(request, self._backend.transient, self.location(path))
        except FileNotFoundError as error:
            raise StoreError(f"{self.location(path)} cannot be {action}: not found ({error})") from error
        except Exception as error:  # every filesystem brings exception types of its own
            raise StoreError(f"{self.location(path)} cannot be {action}: {type(error).__name__}: {error}") from error


def _open(url: str, single_driver: bool) -> tuple[Backend, str]:
    """The backend, and the URL that names the same place from any working directory."""
    if "://" not in url or urlsplit(url).scheme in {"file", "local"}:
        root = Path(url.partition("://")[2] or url).expanduser().absolute()
        if root.exists() and not root.is_dir():
            raise OutputError(f"{root}: a file, expected a folder or nothing yet; name another location")
        return LocalFolder(root), str(root)
    try:
        return open_remote(url, single_driver), url
    except (ValueError, ImportError) as error:
        raise OutputError(
            f"{_without_credentials(url)}: no such kind of storage ({error}); use a folder, s3://bucket/… or memory://…"
        ) from error


def _without_credentials(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
