"""A server that is away for a moment is waited for, and one that says no is not."""

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from srr_dist.errors import StoreError
from srr_dist.store import ObjectStore, patience
from srr_dist.store.patience import patiently
from tests.s3 import MotoServer, SeaweedServer

DEADLINE_SECONDS = 60
TRANSIENT = [("503 Slow Down", "SlowDown"), ("500 Internal Server Error", "InternalError"), ("502 Bad Gateway", "502")]
FINAL = [
    ("403 Forbidden", "AccessDenied", "PermissionError"),
    ("404 Not Found", "NoSuchBucket", "not found"),
    ("400 Bad Request", "InvalidRequest", "Bad Request|refused by the test"),
    ("501 Not Implemented", "NotImplemented", "Not Implemented|refused by the test"),
    ("507 Insufficient Storage", "XMinioStorageFull", "Insufficient Storage|refused by the test"),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"from a file")
    return path


def operations(store: ObjectStore, file: Path) -> dict[str, Callable[[], Any]]:
    """One request of each kind, for a store that holds "old" and "gone", both b"old"."""
    return {
        "get": lambda: store.get("old"),
        "get_range": lambda: store.get_range("old", 0, 2),
        "size": lambda: store.size("old"),
        "put": lambda: store.put("put", b"x"),
        "create": lambda: store.create("created", b"x"),
        "replace": lambda: store.replace("replaced", b"old", b"new"),
        "upload": lambda: store.upload(file, "uploaded"),
        "copy": lambda: store.copy("old", "copied"),
        "list": lambda: store.list("folder"),
        "delete": lambda: store.delete("gone"),
    }


def prepare(store: ObjectStore) -> None:
    for name in ("old", "gone", "replaced"):
        store.put(name, b"old")


def check(store: ObjectStore) -> None:
    """That each of the operations was done."""
    assert {path: store.get(path) for path in store.list()} == {
        "old": b"old",
        "put": b"x",
        "created": b"x",
        "replaced": b"new",
        "uploaded": b"from a file",
        "copied": b"old",
    }


def test_requests_that_fail_for_a_while_succeed(s3: MotoServer, s3_store: ObjectStore, file: Path):
    prepare(s3_store)
    answers = count()

    def fail_at_first(environ, start):
        if (number := next(answers)) < 40:  # more often than the client library tries by itself
            return s3.refuse(*TRANSIENT[number % len(TRANSIENT)], environ, start)
        return s3.serve(environ, start)

    s3.handler = fail_at_first
    with ThreadPoolExecutor(10) as pool:
        for future in [pool.submit(operation) for operation in operations(s3_store, file).values()]:
            future.result(DEADLINE_SECONDS)
    check(s3_store)


@pytest.mark.parametrize(("status", "code", "message"), FINAL)
def test_requests_that_are_refused_fail_at_once(s3: MotoServer, s3_store: ObjectStore, file, status, code, message):
    requests = []

    def refuse(environ, start):
        requests.append(environ["REQUEST_METHOD"])
        return s3.refuse(status, code, environ, start)

    s3.handler = refuse
    for name in ("get", "put", "upload", "list", "create"):
        requests.clear()
        with pytest.raises(StoreError, match=message):
            operations(s3_store, file)[name]()
        assert len(requests) <= 2, name  # a size is asked for before some reads


def test_server_that_stays_away_is_an_error_that_names_the_object(s3_store: ObjectStore, s3, monkeypatch):
    monkeypatch.setattr(patience, "TOTAL_SECONDS", 0.5)
    s3.handler = lambda environ, start: s3.refuse("503 Slow Down", "SlowDown", environ, start)
    with pytest.raises(StoreError, match=r"record cannot be created: .*refused by the test"):
        s3_store.create("record", b"x")


@pytest.mark.parametrize("total", [0.0, 0.2, 0.5])
def test_patience_ends_after_its_total_time(monkeypatch, total):
    monkeypatch.setattr(patience, "TOTAL_SECONDS", total)
    slept = []
    now = [1000.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(patience.time, "sleep", sleep)
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])

    def fail() -> None:
        raise ConnectionError("away")

    with pytest.raises(ConnectionError, match="away"):
        patiently(fail, lambda error: isinstance(error, ConnectionError), "object")
    assert sum(slept) <= total
    assert bool(slept) == (total > 0.1)
    assert slept == sorted(slept)


def test_real_server_killed_and_started_again_is_waited_for(own_server: SeaweedServer, file: Path, caplog):
    store = ObjectStore("s3://bucket/out")
    prepare(store)
    own_server.kill()
    with caplog.at_level(logging.DEBUG, logger="srr_dist"), ThreadPoolExecutor(10) as pool:
        running = [pool.submit(operation) for operation in operations(store, file).values()]
        failed = seen_to_fail(running, caplog)
        own_server.start()
        for future in running:
            future.result(DEADLINE_SECONDS)
    assert failed == len(running)
    check(store)


def seen_to_fail(running: list[Future[Any]], caplog: pytest.LogCaptureFixture) -> int:
    """Wait until as many failures were logged as there are requests; returns how many requests still go on."""
    while sum("trying again" in record.getMessage() for record in caplog.records) < len(running):
        assert not wait(running, timeout=0.05, return_when=FIRST_COMPLETED).done
    return sum(not future.done() for future in running)


def test_real_server_paused_and_continued_answers_what_was_asked(own_server: SeaweedServer, file: Path):
    store = ObjectStore("s3://bucket/out")
    prepare(store)
    own_server.pause()
    with ThreadPoolExecutor(10) as pool:
        running = [pool.submit(operation) for operation in operations(store, file).values()]
        assert not wait(running, timeout=1, return_when=FIRST_COMPLETED).done
        own_server.resume()
        for future in running:
            future.result(DEADLINE_SECONDS)
    check(store)
