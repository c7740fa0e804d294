"""A folder as a store: temporary file, fsync, then one atomic rename or link."""

# ruff: noqa: D102  (the methods' contract is Backend's)
from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from srr_dist.store.paths import TEMPORARY_PREFIX

CHUNK_BYTES = 8 * 2**20
LOCK_PREFIX = f"{TEMPORARY_PREFIX}lock-"
"""Files that processes lock while they replace the object named after it; they stay, empty."""

_TRANSIENT = {errno.EINTR, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT}
_NO_HARD_LINK = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS}


class LocalFolder:
    """Backend over a POSIX folder, which need not exist yet.

    A network file system works if its links are atomic and, for ``replace``, if it passes locks on to the server, as
    NFS does unless it is mounted with ``nolock``. Symbolic links that lead out of the folder are refused.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def transient(self, error: Exception) -> bool:
        return isinstance(error, OSError) and error.errno in _TRANSIENT

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        with self._file(path).open("rb") as file:
            first = file.seek(start or 0)
            return file.read(-1 if stop is None else stop - first)

    def size(self, path: str) -> int | None:
        try:
            status = self._file(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def put(self, path: str, data: bytes) -> None:
        with self._temporary(path) as temporary:
            _write(temporary, [data])
            self._publish(temporary, path)

    def create(self, path: str, data: bytes) -> bool:
        with self._temporary(path) as temporary:
            _write(temporary, [data])
            try:
                # Unlike a rename, a link fails if the name is taken, and the name appears with all of its content.
                os.link(temporary, self._file(path))
            except FileExistsError:
                return False
            _sync_folder(temporary.parent)
            return True

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, hashlib.sha256(data).hexdigest()

    def replace(self, path: str, data: bytes, expected: str) -> bool:
        file = self._file(path)
        try:
            with file.with_name(f"{LOCK_PREFIX}{file.name}").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if self.read_versioned(path)[1] != expected:
                    return False
                self.put(path, data)
                return True
        except FileNotFoundError:
            return False

    def upload(self, local: Path, path: str) -> tuple[int, str]:
        with self._temporary(path) as temporary:
            size, sha256 = _write(temporary, _chunks(local))
            self._publish(temporary, path)
            return size, sha256

    def copy(self, source: str, target: str) -> None:
        with self._temporary(target) as temporary:
            try:
                os.link(self._file(source), temporary)
            except OSError as error:
                if error.errno not in _NO_HARD_LINK:
                    raise
                _write(temporary, _chunks(self._file(source)))
            self._publish(temporary, target)

    def list(self, prefix: str) -> dict[str, int]:
        sizes = {}
        for file in self._walk(prefix):
            # Another process may remove or rename a file between the listing and the look at it.
            with suppress(FileNotFoundError):
                status = file.lstat()
                if stat.S_ISREG(status.st_mode) and not file.name.startswith(TEMPORARY_PREFIX):
                    sizes[file.relative_to(self.root).as_posix()] = status.st_size
        return dict(sorted(sizes.items()))

    def delete(self, path: str) -> None:
        self._file(path).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self._file(prefix))

    def discard_unfinished(self, prefix: str) -> None:
        for file in self._walk(prefix):
            if file.name.startswith(TEMPORARY_PREFIX) and not file.name.startswith(LOCK_PREFIX):
                file.unlink(missing_ok=True)

    def _file(self, path: str) -> Path:
        """Where the object lies; PermissionError if that is outside of the folder."""
        file = self.root / path
        if not (found := file.resolve()).is_relative_to(self.root.resolve()):
            raise PermissionError(f"a symbolic link leads out of {self.root}, to {found}")
        return file

    def _walk(self, prefix: str) -> Iterator[Path]:
        for folder, _, names in os.walk(self._file(prefix), onerror=_raise_unless_missing):
            yield from (Path(folder, name) for name in names)

    @contextmanager
    def _temporary(self, path: str) -> Iterator[Path]:
        """A free name beside ``path``, whose file is gone afterwards; only a killed process leaves one behind."""
        folder = self._file(path).parent
        _make_folder(folder)
        temporary = folder / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            yield temporary
        finally:
            # Also after a rename: POSIX leaves both names when they already are links to one file.
            temporary.unlink(missing_ok=True)

    def _publish(self, temporary: Path, path: str) -> None:
        temporary.replace(self.root / path)
        _sync_folder(temporary.parent)


def _chunks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _write(file: Path, chunks: Iterable[bytes]) -> tuple[int, str]:
    """Write a new file through to the disk; returns its size and sha256."""
    size, digest = 0, hashlib.sha256()
    with file.open("xb") as stream:
        for chunk in chunks:
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return size, digest.hexdigest()


def _raise_unless_missing(error: OSError) -> None:
    """For os.walk, which by itself would take a folder that it may not read for an empty one."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they outlive a power cut, as the files in them do."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
