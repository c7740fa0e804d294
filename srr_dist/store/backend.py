"""What a place that keeps objects must be able to do, and what it must promise."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Backend(Protocol):
    """Objects under one root.

    Paths were checked already. A write is visible whole or not at all, also when the process is killed in its middle.
    Any exception may be raised for a failure; FileNotFoundError means that the object is not there. Nothing is tried
    again here but what a client library does by itself.
    """

    def transient(self, error: Exception) -> bool:
        """Whether a failure may pass by itself, so that the same call is worth another try."""

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of an object, fewer where it ends before."""

    def size(self, path: str) -> int | None:
        """Bytes in the object; None if there is none (a folder is none)."""

    def put(self, path: str, data: bytes) -> None:
        """Create or replace."""

    def create(self, path: str, data: bytes) -> bool:
        """Create; False, and nothing changed, if the object exists. Of any number of callers at most one gets True."""

    def read_versioned(self, path: str) -> tuple[bytes, str]:
        """The object and a version no newer than it, which another content does not have."""

    def replace(self, path: str, data: bytes, expected: str) -> bool:
        """Replace the object if this still is its version; False, and nothing changed, if it has another or is gone.

        Of any number of callers that expect the same version at most one gets True. For objects of a few kilobytes
        that nothing else but ``create`` writes.
        """

    def upload(self, local: Path, path: str) -> tuple[int, str]:
        """Create or replace by a local file's content; returns size and sha256 (hex) of what was sent."""

    def copy(self, source: str, target: str) -> None:
        """Create or replace ``target`` by ``source``, without the bytes passing through here where that is possible."""

    def list(self, prefix: str) -> dict[str, int]:
        """Path -> size of all objects below the folder ``prefix`` ("" = all), sorted by path."""

    def delete(self, path: str) -> None:
        """Remove an object; none there is no error."""

    def delete_tree(self, prefix: str) -> None:
        """Remove all objects below the folder ``prefix``; none there is no error."""

    def discard_unfinished(self, prefix: str) -> None:
        """Remove what killed writers left below the folder ``prefix`` ("" = all) of objects that never came to be."""
