"""Stores behind fsspec: S3 and whatever else writes whole objects and honours ``mode="create"``; and memory.

``fs.open(path, "wb")`` is not used: it publishes what was written so far when its body raises.
"""

# ruff: noqa: D102  (the methods' contract is Backend's)
from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from srr_dist.store.backend import Backend

CREATE_ATTEMPTS = 8
DELETE_THREADS = 16
_EXISTS = {"PreconditionFailed", "412"}
_CONTENDED = {"ConditionalRequestConflict", "OperationAborted", "409"}


def open_remote(url: str) -> Backend:
    """The backend for a URL; ValueError or ImportError if there is none."""
    if "::" in url:
        raise ValueError("a chained URL puts a cache before the objects")
    if url.startswith("memory://"):
        return MemoryFolder(url)
    if not urlsplit(url).netloc:
        raise ValueError("it names no bucket or host")
    return RemoteFolder(url)


class RemoteFolder:
    """Backend over an fsspec filesystem whose ``pipe_file`` and ``put_file`` publish an object at once, as S3's do."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._filesystem, root = url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False)
        self._root = root.rstrip("/")

    @property
    def filesystem(self) -> AbstractFileSystem:
        # A filesystem's connections and event loop do not survive a fork.
        if self._process != os.getpid():
            self._open()
        return self._filesystem

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        data: bytes = self.filesystem.cat_file(self._full(path), start=start, end=stop)
        return data

    def size(self, path: str) -> int | None:
        try:
            info = self.filesystem.info(self._full(path))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def put(self, path: str, data: bytes) -> None:
        self.filesystem.pipe_file(self._full(path), data)

    def create(self, path: str, data: bytes) -> bool:
        attempt = 0
        while True:
            try:
                self.filesystem.pipe_file(self._full(path), data, mode="create")
                return True
            except OSError as error:
                code = _server_code(error)
                if isinstance(error, FileExistsError) or code in _EXISTS:
                    return False
                attempt += 1
                if code not in _CONTENDED or attempt == CREATE_ATTEMPTS:
                    raise
            # The server could not say which of several writers wins; random delays keep them from meeting again.
            time.sleep(random.uniform(0, 0.1 * 2**attempt))

    def upload(self, local: Path, path: str) -> tuple[int, str]:
        with ThreadPoolExecutor(1) as hasher, local.open("rb") as stream:
            digest = hasher.submit(hashlib.file_digest, stream, "sha256")
            self.filesystem.put_file(str(local), self._full(path))
            return local.stat().st_size, digest.result().hexdigest()

    def copy(self, source: str, target: str) -> None:
        self.filesystem.cp_file(self._full(source), self._full(target))

    def list(self, prefix: str) -> dict[str, int]:
        folder = f"{self._full(prefix)}/" if prefix else f"{self._root}/"
        found = self.filesystem.find(folder, detail=True)
        files = sorted(name for name, info in found.items() if info["type"] == "file" and name.startswith(folder))
        return {name.removeprefix(f"{self._root}/"): int(found[name]["size"]) for name in files}

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.filesystem.rm_file(self._full(path))

    def delete_tree(self, prefix: str) -> None:
        # One by one, because fsspec's rm takes its paths for patterns.
        with ThreadPoolExecutor(DELETE_THREADS) as pool:
            for _ in pool.map(self.delete, self.list(prefix)):
                pass

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"


class MemoryFolder(RemoteFolder):
    """Backend over ``memory://``, objects of this process: for tests and trials."""

    # fsspec's filesystem in memory looks and writes in two steps.
    _creating = threading.Lock()

    def create(self, path: str, data: bytes) -> bool:
        with self._creating:
            return super().create(path, data)

    def upload(self, local: Path, path: str) -> tuple[int, str]:
        # Its put_file publishes the object empty and fills it afterwards.
        data = local.read_bytes()
        self.put(path, data)
        return len(data), hashlib.sha256(data).hexdigest()


def _server_code(error: OSError) -> str | None:
    """The error code in an S3 server's answer; the exception's own type differs from server to server."""
    response: dict[str, Any] = getattr(error.__cause__, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code
