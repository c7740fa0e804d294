"""Stores behind fsspec: S3, Google's, and whatever else writes whole objects and honours ``mode="create"``; and memory.

``fs.open(path, "wb")`` is not used: it publishes what was written so far when its body raises.
"""

# ruff: noqa: D102  (the methods' contract is Backend's)
from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from aiohttp import ClientError
from botocore import exceptions as aws
from botocore.parsers import ResponseParserError
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from srr_dist.store.backend import Backend

DELETE_THREADS = 16
S3_CLIENT = {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard", "total_max_attempts": 3}}
"""botocore's own few tries, which repeat a part of an upload instead of the whole; patience comes on top of them."""

GCS_SCHEMES = {"gs", "gcs"}

_EXISTS = {"PreconditionFailed", "412"}
_GONE = {"NoSuchKey", "404"}
_TRANSIENT_CODES = {
    "ConditionalRequestConflict", "OperationAborted", "409",  # the server cannot yet say which writer wins
    "NoSuchUpload",  # of an upload's parts: the answer that they are one object now was lost
    "InternalError", "RequestTimeout", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException",
    "TooManyRequests", "429", "500", "502", "503", "504",
}  # fmt: skip
_FINAL_STATUSES = {501, 507}  # what the server cannot do, and what it has no room for
_TRANSIENT_ERRORS = (
    ConnectionError, TimeoutError, aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError,
    aws.ResponseStreamingError, ResponseParserError, ClientError,
)  # fmt: skip


def open_filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """A fresh filesystem for a URL or local path, and the path within it; ValueError or ImportError if there is none.

    Nothing of it is shared or cached, so that it is safe after a fork and sees what others write.
    """
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if urlsplit(url).scheme in {"s3", "s3a"}:
        options["config_kwargs"] = S3_CLIENT
    filesystem, root = url_to_fs(url, **options)
    filesystem.retries = 1  # s3fs would try each failure of the client library five times more
    return filesystem, root


def is_transient(error: Exception) -> bool:
    """Whether what a filesystem raised may pass by itself: no connection, an overloaded server."""
    code, status = _server_answer(error)
    if code is None:
        return isinstance(error, _TRANSIENT_ERRORS)
    return code in _TRANSIENT_CODES or (status >= 500 and status not in _FINAL_STATUSES)


def open_remote(url: str, single_driver: bool) -> Backend:
    """The backend for a URL; ValueError or ImportError if there is none."""
    if "::" in url:
        raise ValueError("a chained URL puts a cache before the objects")
    if url.startswith("memory://"):
        return MemoryFolder(url)
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ValueError("credentials do not belong into a URL, which is logged and stored; use AWS_ACCESS_KEY_ID, …")
    if not parts.netloc:
        raise ValueError("it names no bucket or host")
    kind = GcsFolder if parts.scheme in GCS_SCHEMES else RemoteFolder
    return kind(url, single_driver)


class RemoteFolder:
    """Backend over an fsspec filesystem whose ``pipe_file`` and ``put_file`` publish an object at once, as S3's do.

    With ``single_driver`` the two conditional writes look before they write instead of asking the server to.
    """

    def __init__(self, url: str, single_driver: bool = False) -> None:
        self.url = url
        self.single_driver = single_driver
        self._open()

    def _open(self) -> None:
        self._process = os.getpid()
        self._filesystem, root = open_filesystem(self.url)
        self._root = root.rstrip("/")

    @property
    def filesystem(self) -> AbstractFileSystem:
        # A filesystem's connections and event loop do not survive a fork.
        if self._process != os.getpid():
            self._open()
        return self._filesystem

    def transient(self, error: Exception) -> bool:
        return is_transient(error)

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
        if self.single_driver:
            return self.size(path) is None and self._write_if(path, data)
        return self._write_if(path, data, mode="create")

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        if self.single_driver:
            data = self.read(path)
            return data, hashlib.sha256(data).hexdigest()
        # In this order: content newer than its version makes a replacement fail, the opposite would let it succeed.
        version = self._version(path)
        return self.read(path), version

    def replace(self, path: str, data: bytes, expected: str) -> bool:
        if not self.single_driver:
            return self._write_over(path, data, expected)
        return self.size(path) is not None and self.read_versioned(path)[1] == expected and self._write_if(path, data)

    def _version(self, path: str) -> str:
        version = self.filesystem.info(self._full(path)).get("ETag")
        if version is None:
            raise NotImplementedError(f"{type(self.filesystem).__name__} gives no versions (ETags) of objects")
        return str(version)

    def _write_over(self, path: str, data: bytes, expected: str) -> bool:
        """Write if the object still has this version; False if not."""
        return self._write_if(path, data, IfMatch=expected)

    def _write_if(self, path: str, data: bytes, **condition: str) -> bool:
        """Write in one request; False if the server says that the condition does not hold."""
        try:
            self.filesystem.pipe_file(self._full(path), data, **condition)
        except OSError as error:
            code, _ = _server_answer(error)
            if isinstance(error, FileExistsError) or code in _EXISTS or (code in _GONE and "IfMatch" in condition):
                return False
            raise
        return True

    def upload(self, local: Path, path: str) -> tuple[int, str]:
        with ThreadPoolExecutor(1) as hasher, local.open("rb") as stream:
            digest = hasher.submit(hashlib.file_digest, stream, "sha256")
            self.filesystem.put_file(str(local), self._full(path))
            return local.stat().st_size, digest.result().hexdigest()

    def copy(self, source: str, target: str) -> None:
        self.filesystem.cp_file(self._full(source), self._full(target))

    def list(self, prefix: str) -> dict[str, int]:
        folder = self._folder(prefix)
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

    def discard_unfinished(self, prefix: str) -> None:
        if hasattr(self.filesystem, "abort_mpu"):
            bucket, _, key = self._folder(prefix).partition("/")
            for upload in list(self._uploads(bucket, key)):
                with suppress(FileNotFoundError):  # somebody else was faster
                    self.filesystem.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def _uploads(self, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
        """Multipart uploads that were begun and neither completed nor aborted."""
        page: dict[str, Any] = {}
        while True:
            answer = self.filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **page)
            # Servers exist that list uploads of all names.
            yield from (upload for upload in answer.get("Uploads", []) if upload["Key"].startswith(prefix))
            if not answer.get("IsTruncated"):
                return
            page = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _folder(self, prefix: str) -> str:
        return f"{self._full(prefix)}/" if prefix else f"{self._root}/"


class GcsFolder(RemoteFolder):
    """Backend over Google Cloud Storage: versions are generations; gcsfs itself has the condition of ``create`` only.

    Uploads that were cut off are no objects there, and the server forgets them after a week.
    """

    def _version(self, path: str) -> str:
        return str(self.filesystem.info(self._full(path))["generation"])

    def _write_over(self, path: str, data: bytes, expected: str) -> bool:
        bucket, _, name = self._full(path).partition("/")
        url = f"{self.filesystem.base.removesuffix('storage/v1/')}upload/storage/v1/b/{quote(bucket)}/o"
        condition = {"uploadType": "media", "name": name, "ifGenerationMatch": expected}
        try:
            self.filesystem.call(
                "POST", url, data=data, headers={"Content-Type": "application/octet-stream"}, **condition
            )
        except FileExistsError:  # what gcsfs makes of "precondition failed"
            return False
        return True


class MemoryFolder(RemoteFolder):
    """Backend over ``memory://``, objects of this process: for tests and trials."""

    # Makes one step of looking and writing.
    _writing = threading.Lock()

    def __init__(self, url: str) -> None:
        super().__init__(url, single_driver=True)

    def create(self, path: str, data: bytes) -> bool:
        with self._writing:
            return super().create(path, data)

    def replace(self, path: str, data: bytes, expected: str) -> bool:
        with self._writing:
            return super().replace(path, data, expected)

    def upload(self, local: Path, path: str) -> tuple[int, str]:
        # Its put_file publishes the object empty and fills it afterwards.
        data = local.read_bytes()
        self.put(path, data)
        return len(data), hashlib.sha256(data).hexdigest()


def _server_answer(error: Exception) -> tuple[str | None, int]:
    """Error code and HTTP status in a server's answer; the exception's own type differs from server to server."""
    if isinstance(status := getattr(error, "code", None), int):  # gcsfs
        return str(status), status
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, dict):
        return None, 0
    return response.get("Error", {}).get("Code"), response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
