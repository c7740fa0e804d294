"""Writers killed in the middle of a write: real processes, SIGKILL, every kind of store that outlives them."""

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import s3fs

from srr_dist.errors import StoreError
from srr_dist.store import ObjectStore
from srr_dist.store.local import CHUNK_BYTES, LOCK_PREFIX
from srr_dist.store.paths import TEMPORARY_PREFIX

DEADLINE_SECONDS = 60
LARGE = 4 * 2**20


def start(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def kill_when(condition: Callable[[], bool], process: BaseProcess) -> None:
    """SIGKILL once the condition holds, which it must while the process is at work."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        process.join(0.001)
        assert process.is_alive(), "the process ended before it could be killed"
        assert time.monotonic() < deadline, "the process never came to the point where it is killed"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def temporary_files(store: ObjectStore) -> list[Path]:
    return list(Path(store.url).rglob(f"{TEMPORARY_PREFIX}*"))


def test_local_upload_killed_halfway_leaves_no_object_and_can_be_repeated(local_store, tmp_path):
    source = tmp_path / "pipe"
    os.mkfifo(source)
    # A pipe that never ends holds the upload in its middle. Opened for both ways, so that no side waits for the other.
    pipe = os.open(source, os.O_RDWR | os.O_NONBLOCK)

    def first_chunk_written() -> bool:
        with suppress(BlockingIOError):
            os.write(pipe, bytes(2**16))
        return any(file.stat().st_size >= CHUNK_BYTES for file in temporary_files(local_store))

    kill_when(first_chunk_written, start(local_store.upload, source, "blocks/a"))
    os.close(pipe)
    assert local_store.list() == {}
    assert not local_store.exists("blocks/a")
    assert len(temporary_files(local_store)) == 1

    whole = tmp_path / "whole"
    whole.write_bytes(b"content")
    local_store.upload(whole, "blocks/a")
    assert local_store.list() == {"blocks/a": 7}
    local_store.replace("blocks/a", b"content", b"changed")
    local_store.discard_unfinished("blocks")
    assert [file.name for file in temporary_files(local_store)] == [".tmp-lock-a"]
    assert local_store.list() == {"blocks/a": 7}


def write_beyond_the_limit(store: ObjectStore, file: Path) -> None:
    """Try every kind of write where files may not grow beyond a megabyte, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    large = bytes(LARGE)
    operations = {
        "put": lambda: store.put("old", large),
        "create": lambda: store.create("created", large),
        "replace": lambda: store.replace("old", b"old", large),
        "upload": lambda: store.upload(file, "uploaded"),
    }
    for name, operation in operations.items():
        with pytest.raises(StoreError, match=r"cannot be (written|created|replaced)"):
            operation()
            pytest.fail(f"{name} wrote {LARGE} bytes")


def test_local_write_that_the_disk_has_no_room_for_leaves_what_was_there(local_store, tmp_path):
    local_store.put("old", b"old")
    file = tmp_path / "large"
    file.write_bytes(bytes(LARGE))
    process = start(write_beyond_the_limit, local_store, file)
    process.join(DEADLINE_SECONDS)
    assert process.exitcode == 0
    assert local_store.list() == {"old": 3}
    assert local_store.get("old") == b"old"
    assert [path.name for path in temporary_files(local_store) if LOCK_PREFIX not in path.name] == []


def write_forever(store: ObjectStore) -> None:
    """Replace one object and create others, each filled with one byte value."""
    for number in count():
        content = bytes([number % 256]) * LARGE
        store.put("replaced", content)
        store.create(f"created/{number:06}", content)


@pytest.mark.parametrize("attempt", range(3))
def test_local_objects_of_a_killed_writer_are_whole(local_store, attempt):
    def in_the_middle() -> bool:
        return len(local_store.list("created")) > attempt and len(temporary_files(local_store)) > 0

    kill_when(in_the_middle, start(write_forever, local_store))
    sizes = local_store.list()
    assert "replaced" in sizes
    assert set(sizes.values()) == {LARGE}
    for path in sizes:
        content = local_store.get(path)
        assert content == content[:1] * LARGE


def unfinished_uploads() -> list[str]:
    """Keys of the uploads whose parts lie in the bucket."""
    found = s3fs.S3FileSystem(skip_instance_cache=True).call_s3("list_multipart_uploads", Bucket="bucket")
    return [upload["Key"] for upload in found.get("Uploads", [])]


def test_s3_upload_killed_between_its_parts_leaves_no_object_and_its_parts_can_be_discarded(s3, s3_store, tmp_path):
    second_part_arrived, killed = threading.Event(), threading.Event()
    first_part_stored = threading.Event()

    def hold_second_part(environ, answer):
        if "partNumber=2" in environ["QUERY_STRING"]:
            second_part_arrived.set()
            killed.wait(DEADLINE_SECONDS)
            return []
        result = s3.serve(environ, answer)
        if "partNumber=1" in environ["QUERY_STRING"]:
            first_part_stored.set()
        return result

    file = tmp_path / "large"
    with file.open("wb") as stream:
        stream.truncate(101 * 2**20)  # s3fs sends parts from 100 MiB on
    s3.handler = hold_second_part
    try:
        process = start(s3_store.upload, file, "blocks/a")
        kill_when(lambda: first_part_stored.is_set() and second_part_arrived.is_set(), process)
    finally:
        killed.set()
    assert not s3_store.exists("blocks/a")
    assert s3_store.list() == {}
    (unfinished,) = [key for key in unfinished_uploads() if key.endswith("/blocks/a")]
    s3_store.discard_unfinished("block")
    assert unfinished in unfinished_uploads()
    s3_store.discard_unfinished("blocks")
    assert unfinished not in unfinished_uploads()


def test_real_s3_server_upload_that_was_abandoned_is_discarded_and_those_beside_it_are_not(seaweed_store):
    filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
    root = seaweed_store.url.removeprefix("s3://bucket/")
    keys = [f"{root}/area/x", f"{root}/area/y", f"{root}/area2/z"]
    for key in keys:
        begun = filesystem.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
        filesystem.call_s3(
            "upload_part", Bucket="bucket", Key=key, PartNumber=1, UploadId=begun["UploadId"], Body=b"part"
        )
    seaweed_store.discard_unfinished("area")
    assert [key for key in unfinished_uploads() if key.startswith(root)] == keys[2:]
    seaweed_store.discard_unfinished()
    assert [key for key in unfinished_uploads() if key.startswith(root)] == []
