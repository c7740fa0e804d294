"""Ranged reads return exactly the bytes asked for, in few and bounded requests."""

from __future__ import annotations

import socket
from functools import partial
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srr_dist.checkpoint import location
from srr_dist.checkpoint.location import ByteRange, fetch, list_files, resolve
from srr_dist.errors import CheckpointError, StoreError
from srr_dist.store import patience

CONTENT = bytes(range(256)) * 40
URL = "memory://ranges"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The ranges that reach the filesystem."""
    seen: list[tuple[str, int, int]] = []
    cat_file = MemoryFileSystem.cat_file

    def spy(self: Any, path: str, start: int, end: int) -> bytes:
        seen.append((path.rsplit("/", 1)[-1], start, end))
        return cat_file(self, path, start=start, end=end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", spy)
    for name in ("a", "b"):
        fsspec.filesystem("memory").pipe_file(f"/ranges/{name}", CONTENT)
    return seen


def test_neighbouring_ranges_share_a_request(requests: list[tuple[str, int, int]]) -> None:
    wanted = [ByteRange("a", 300, 400), ByteRange("a", 0, 100), ByteRange("b", 5, 6)]
    assert fetch(URL, wanted) == [CONTENT[300:400], CONTENT[:100], CONTENT[5:6]]
    assert sorted(requests) == [("a", 0, 400), ("b", 5, 6)]


def test_distant_ranges_do_not_share_a_request(
    requests: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(location, "_MERGE_GAP", 50)
    fetch(URL, [ByteRange("a", 0, 100), ByteRange("a", 150, 160), ByteRange("a", 211, 220)])
    assert sorted(requests) == [("a", 0, 160), ("a", 211, 220)]


def test_long_range_is_split_into_requests(
    requests: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(location, "_REQUEST_BYTES", 400)
    assert fetch(URL, [ByteRange("a", 10, 1010)]) == [CONTENT[10:1010]]
    assert sorted(requests) == [("a", 10, 410), ("a", 410, 810), ("a", 810, 1010)]


def test_no_range_makes_no_request(requests: list[tuple[str, int, int]]) -> None:
    assert fetch(URL, []) == []
    assert fetch(URL, [ByteRange("a", 7, 7)]) == [b""]
    assert requests == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, len(CONTENT)), st.integers(0, 900)), max_size=12))
def test_fetch_of_any_ranges_returns_their_bytes(
    requests: list[tuple[str, int, int]], wanted: list[tuple[str, int, int]]
) -> None:
    ranges = [ByteRange(file, start, min(start + length, len(CONTENT))) for file, start, length in wanted]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(location, "_MERGE_GAP", 64)
        patch.setattr(location, "_REQUEST_BYTES", 300)
        patch.setattr(location, "_REQUESTS_IN_FLIGHT", 3)
        assert fetch(URL, ranges) == [CONTENT[wanted.start : wanted.stop] for wanted in ranges]


def test_range_beyond_the_end_is_refused(requests: list[tuple[str, int, int]]) -> None:
    with pytest.raises(CheckpointError, match=r"memory://ranges/a: expected 20 bytes at offset 10230, found 10"):
        fetch(URL, [ByteRange("a", len(CONTENT) - 10, len(CONTENT) + 10)])


def unsteady(monkeypatch: pytest.MonkeyPatch, error: Exception, failures: float) -> None:
    """Let that many reads fail, and nobody wait long for the next."""
    cat_file, errors = MemoryFileSystem.cat_file, count()

    def read(self: Any, path: str, start: int, end: int) -> bytes:
        if next(errors) < failures:
            raise error
        return cat_file(self, path, start=start, end=end)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", read)
    monkeypatch.setattr(patience, "TOTAL_SECONDS", 0.5)


def test_reads_that_fail_for_a_while_succeed(requests: object, monkeypatch: pytest.MonkeyPatch) -> None:
    unsteady(monkeypatch, ConnectionResetError("reset"), failures=2)
    assert fetch(URL, [ByteRange("a", 0, 10)]) == [CONTENT[:10]]


def test_server_that_stays_away_is_storage_s_fault(requests: object, monkeypatch: pytest.MonkeyPatch) -> None:
    unsteady(monkeypatch, ConnectionResetError("reset"), failures=inf)
    with pytest.raises(StoreError, match=r"memory://ranges cannot be read: ConnectionResetError: reset; try again"):
        fetch(URL, [ByteRange("a", 0, 10)])


def test_reads_that_are_not_allowed_are_refused_at_once(requests: object, monkeypatch: pytest.MonkeyPatch) -> None:
    unsteady(monkeypatch, PermissionError("denied"), failures=1)
    with pytest.raises(CheckpointError, match=r"cannot reach memory://ranges: PermissionError: denied"):
        fetch(URL, [ByteRange("a", 0, 10)])


def test_list_files_gives_sizes_and_leaves_folders_out(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    assert list_files(str(tmp_path)) == {"weights": 3}


def test_resolve_makes_local_paths_absolute_and_keeps_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    assert resolve("org/name", None) == str(tmp_path / "org" / "name")  # a folder goes before a hub id
    assert resolve(f"file://{tmp_path}", None) == str(tmp_path)
    assert resolve("s3://bucket/model/", None) == "s3://bucket/model"


def test_hub_id_is_pinned_to_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        sha = "0123abcd"

    monkeypatch.setattr(location.HfApi, "model_info", lambda _self, repository, revision: Answer())
    assert resolve("org/name", "v1") == "hf://org/name@0123abcd"


def test_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr(location, "HfApi", partial(location.HfApi, endpoint=endpoint))
        with pytest.raises(
            CheckpointError, match=r"org/name \(revision main\): not a local path, .*[Rr]efused.*; .* HF_TOKEN"
        ):
            resolve("org/name", None)
