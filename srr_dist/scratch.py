"""Folders of the local disk that go with their process, however that ends.

What a process leaves behind that was killed may be gigabytes: tensors on their way to storage. It holds a lock on its
folder, which the kernel lets go with it, and whoever makes a folder next on the same disk removes those that nobody
holds.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

_PREFIX = "srr-scratch-"


class Scratch:
    """A new folder among the system's temporary ones; as a context its path, removed at the end of it.

    Attributes:
        path: the folder, which is there until ``close``, or until this object or the process goes.
    """

    def __init__(self) -> None:
        sweep()
        self.path, lock = _locked_folder()
        self._close = weakref.finalize(self, _remove, self.path, lock)

    def close(self) -> None:
        """Remove the folder with all that is in it."""
        self._close()

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def sweep() -> None:
    """Remove the folders of processes that are no more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # somebody else's, gone by now, or on a disk without locks
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its process lives
                os.close(lock)
            else:
                _remove(folder, lock)


def _locked_folder() -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
        with suppress(FileNotFoundError):  # swept by another process before it could be locked: once more
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # without locks, nobody sweeps either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
