"""The one rule for names of objects.

Names come from records, manifests and checkpoints, which others may have written; a store joins them to its root and
reads, writes, links and deletes there. So what is allowed is listed, instead of what is not: nothing that any backend
could read as a parent folder, an absolute path, a drive, a URL, a pattern or an object version gets through.
"""

from __future__ import annotations

import re

from srr_dist.errors import StoreError

TEMPORARY_PREFIX = ".tmp-"
"""Local stores write into files that begin with this before they publish them; no object may."""

_SEGMENT = re.compile(r"[A-Za-z0-9._+=@ -]+")
_FINGERPRINT = re.compile(r"[0-9a-f]{8,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_path(path: str) -> str:
    """Return ``path`` if it may name an object: relative POSIX segments of ``A-Z a-z 0-9 . _ + = @ space -``.

    Raises:
        StoreError: it is empty, absolute or a URL, or has an empty, ``.``, ``..`` or temporary segment or another
            character.
    """
    for segment in path.split("/"):
        if _SEGMENT.fullmatch(segment) is None or segment in {".", ".."} or segment.startswith(TEMPORARY_PREFIX):
            raise StoreError(
                f"path {path!r}: segment {segment!r} is not allowed; a path is relative, separated by '/', "
                "of letters, digits, space and ._+=@-, without '.' and '..'"
            )
    return path


def check_segment(name: str) -> str:
    """Return ``name`` if it may be one segment of a path; raises StoreError like check_path, and for a ``/``."""
    if "/" in name:
        raise StoreError(f"path segment {name!r}: expected no '/'")
    return check_path(name)


def check_fingerprint(fingerprint: str) -> str:
    """Return ``fingerprint`` if it is 8 to 64 lower-case hexadecimal digits, else raise StoreError."""
    if _FINGERPRINT.fullmatch(fingerprint) is None:
        raise StoreError(f"fingerprint {fingerprint!r}: expected 8 to 64 lower-case hexadecimal digits")
    return fingerprint


def check_sha256(digest: str) -> str:
    """Return ``digest`` if it is 64 lower-case hexadecimal digits, else raise StoreError."""
    if _SHA256.fullmatch(digest) is None:
        raise StoreError(f"sha256 {digest!r}: expected 64 lower-case hexadecimal digits")
    return digest
