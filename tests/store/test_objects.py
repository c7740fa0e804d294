"""The contract of ObjectStore, on every kind of store, and what only one kind can do wrong."""

import errno
import hashlib
import multiprocessing
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest

from srr_dist.errors import OutputError, StoreError
from srr_dist.store import FileEntry, ObjectStore

WRITERS = 8


def test_put_then_get_returns_the_bytes(store):
    store.put("a/b.bin", b"\x00one\xff")
    store.put("empty", b"")
    assert store.get("a/b.bin") == b"\x00one\xff"
    assert store.get("empty") == b""


def test_put_existing_object_replaces_it(store):
    store.put("a", b"a longer first content")
    store.put("a", b"second")
    assert store.get("a") == b"second"


def test_get_missing_object_names_it(store):
    with pytest.raises(StoreError, match="no/such cannot be read: not found"):
        store.get("no/such")


def test_get_range_returns_exactly_the_range(store):
    store.put("a", bytes(range(100)))
    assert store.get_range("a", 10, 20) == bytes(range(10, 20))
    assert store.get_range("a", 0, 100) == bytes(range(100))
    assert store.get_range("a", 50, 50) == b""


@pytest.mark.parametrize(("start", "stop"), [(90, 101), (100, 101), (200, 300), (-5, 5), (5, 4)])
def test_get_range_outside_object_is_refused(store, start, stop):
    store.put("a", bytes(100))
    with pytest.raises(StoreError, match="a"):
        store.get_range("a", start, stop)


def test_get_json_reads_the_value(store):
    store.put("a.json", b'{"x": [1, 2.5, null, "\xc3\xa9"]}')
    assert store.get_json("a.json") == {"x": [1, 2.5, None, "é"]}


def test_get_json_of_damaged_object_names_it(store):
    store.put("a.json", b'{"x": ')
    with pytest.raises(StoreError, match=r"a\.json: not valid JSON"):
        store.get_json("a.json")


def test_exists_and_size_know_objects_but_not_folders(store):
    store.put("folder/a", b"12345")
    assert store.exists("folder/a")
    assert store.size("folder/a") == 5
    assert not store.exists("folder")
    assert not store.exists("folder/a/b")
    with pytest.raises(StoreError, match="folder: no such object"):
        store.size("folder")


def test_create_free_path_writes_and_taken_path_does_not(store):
    assert store.create("a/record", b"first") is True
    assert store.create("a/record", b"second") is False
    assert store.get("a/record") == b"first"


def test_create_same_content_again_counts_as_ours(store):
    assert store.create("a", b"same")
    assert store.create("a", b"same")


def test_create_by_threads_has_one_winner(store, eager_switching):
    together = Barrier(WRITERS)
    contents = [f"writer {i}".encode() for i in range(WRITERS)]

    def write(path: str, content: bytes) -> bool:
        together.wait()
        return store.create(path, content)

    with ThreadPoolExecutor(WRITERS) as pool:
        for path in map(str, range(20)):
            won = list(pool.map(partial(write, path), contents))
            assert won.count(True) == 1
            assert store.get(path) == contents[won.index(True)]


@pytest.fixture
def eager_switching():
    """Lets threads take turns so often that two steps of one are seldom left together."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_create_by_processes_has_one_winner(shared_store):
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(WRITERS)
    outcomes = spawn.SimpleQueue()
    processes = [
        spawn.Process(target=_create_together, args=(shared_store, together, f"writer {i}".encode(), outcomes))
        for i in range(WRITERS)
    ]
    for process in processes:
        process.start()
    won = dict(outcomes.get() for _ in processes)
    for process in processes:
        process.join()
    assert sorted(won.values()) == [False] * (WRITERS - 1) + [True]
    assert won[shared_store.get("record")]


def _create_together(store, together, content, outcomes):
    together.wait()
    outcomes.put((content, store.create("record", content)))


def test_upload_stores_the_file_and_describes_it(store, tmp_path):
    content = os.urandom(100_000)
    file = tmp_path / "weights"
    file.write_bytes(content)
    entry = store.upload(file, "blocks/a.safetensors")
    assert entry == FileEntry("blocks/a.safetensors", 100_000, hashlib.sha256(content).hexdigest())
    assert store.get("blocks/a.safetensors") == content


def test_upload_missing_file_names_it_and_writes_nothing(store, tmp_path):
    with pytest.raises(StoreError, match="absent"):
        store.upload(tmp_path / "absent", "a")
    assert store.list() == {}


def test_sha256_is_that_of_the_stored_bytes(store):
    content = bytes(range(256)) * 70_000  # longer than one piece
    store.put("a", content)
    assert store.sha256("a") == hashlib.sha256(content).hexdigest()


def test_copy_gives_equal_content_and_can_be_repeated(store):
    store.put("a", b"content")
    store.copy("a", "out/b")
    store.copy("a", "out/b")
    assert store.get("out/b") == b"content"
    assert store.list() == {"a": 7, "out/b": 7}


def test_copy_missing_object_is_refused(store):
    with pytest.raises(StoreError, match="absent cannot be copied to b: not found"):
        store.copy("absent", "b")
    assert not store.exists("b")


def test_copy_survives_replacement_and_removal_of_its_source(store):
    store.put("a", b"content")
    store.copy("a", "b")
    store.put("a", b"other")
    store.delete("a")
    assert store.get("b") == b"content"


def test_list_is_recursive_sorted_and_by_whole_folder_names(store):
    for path in ["b/2", "b/1/x", "bb/3", "a"]:
        store.put(path, path.encode())
    assert list(store.list().items()) == [("a", 1), ("b/1/x", 5), ("b/2", 3), ("bb/3", 4)]
    assert store.list("b") == {"b/1/x": 5, "b/2": 3}
    assert store.list("absent") == {}
    assert store.list("a") == {}


def test_list_sees_what_another_instance_wrote(store):
    other = ObjectStore(store.url)
    store.put("a/1", b"1")
    assert store.list("a") == {"a/1": 1}
    other.put("a/2", b"22")
    assert store.list("a") == {"a/1": 1, "a/2": 2}
    other.delete("a/1")
    assert not store.exists("a/1")


def test_delete_removes_one_object_and_can_be_repeated(store):
    store.put("a/1", b"1")
    store.put("a/2", b"2")
    store.delete("a/1")
    store.delete("a/1")
    assert store.list() == {"a/2": 1}


def test_delete_tree_removes_the_folder_and_nothing_beside_it(store):
    for path in ["a/1", "a/b/2", "ab/3"]:
        store.put(path, b"x")
    store.delete_tree("a")
    store.delete_tree("a")
    assert store.list() == {"ab/3": 1}


def test_delete_tree_of_everything_is_refused(store):
    store.put("a", b"x")
    with pytest.raises(StoreError):
        store.delete_tree("")
    assert store.exists("a")


def test_pickled_store_sees_the_same_objects(store):
    store.put("a", b"x")
    assert pickle.loads(pickle.dumps(store)).get("a") == b"x"


def test_forked_process_can_use_the_store_it_inherited(shared_store):
    shared_store.put("a", b"x")
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=shared_store.put, args=("b", b"from the child"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert shared_store.get("b") == b"from the child"


def test_probe_of_sound_store_leaves_nothing(store):
    store.probe("area")
    assert store.list() == {}


def test_local_path_and_file_url_name_the_same_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = ObjectStore("out")
    relative.put("a", b"x")
    monkeypatch.chdir("/")
    assert relative.get("a") == b"x"
    assert ObjectStore(f"file://{tmp_path}/out").get("a") == b"x"
    assert relative.location("a") == f"{tmp_path}/out/a"


@pytest.mark.parametrize("url", ["nosuch://host/x", "s3://", "simplecache::s3://bucket/x"])
def test_store_of_unusable_url_is_refused(url):
    with pytest.raises(OutputError, match="no such kind of storage"):
        ObjectStore(url)


def test_local_copy_is_a_hard_link_and_leaves_no_temporary_file(local_store):
    folder = Path(local_store.url)
    local_store.put("a", b"x")
    local_store.copy("a", "b")
    local_store.copy("a", "b")
    assert (folder / "a").stat().st_ino == (folder / "b").stat().st_ino
    assert sorted(folder.iterdir()) == [folder / "a", folder / "b"]


def test_local_copy_without_hard_links_copies(local_store, monkeypatch):
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "this file system has no hard links")

    local_store.put("a", b"x")
    monkeypatch.setattr(os, "link", no_links)
    local_store.copy("a", "b")
    folder = Path(local_store.url)
    assert local_store.get("b") == b"x"
    assert (folder / "a").stat().st_ino != (folder / "b").stat().st_ino


def test_local_create_of_taken_path_leaves_no_temporary_file(local_store):
    local_store.create("a", b"1")
    local_store.create("a", b"2")
    folder = Path(local_store.url)
    assert list(folder.iterdir()) == [folder / "a"]


def test_s3_create_whose_answer_is_lost_is_ours_by_content(s3, s3_store):
    puts = []

    def lose_first_answer(environ, start):
        if environ["REQUEST_METHOD"] != "PUT":
            return s3.serve(environ, start)
        puts.append(environ["PATH_INFO"])
        return s3.lose_answer(environ, start) if len(puts) == 1 else s3.serve(environ, start)

    s3.handler = lose_first_answer
    assert s3_store.create("record", b"nonce 1") is True
    assert len(puts) == 2, "the client was expected to send the write again"
    assert s3_store.create("record", b"nonce 2") is False


def test_s3_create_told_to_try_again_does(s3, s3_store):
    puts = []

    def conflict_first(environ, start):
        if environ["REQUEST_METHOD"] != "PUT":
            return s3.serve(environ, start)
        puts.append(environ["PATH_INFO"])
        if len(puts) == 1:
            return s3.refuse("409 Conflict", "ConditionalRequestConflict", environ, start)
        return s3.serve(environ, start)

    s3.handler = conflict_first
    assert s3_store.create("record", b"x") is True
    assert len(puts) == 2
    assert s3_store.get("record") == b"x"


def test_s3_refusal_names_the_object_and_is_no_conflict(s3, s3_store):
    s3.handler = lambda environ, start: s3.refuse("403 Forbidden", "AccessDenied", environ, start)
    with pytest.raises(StoreError, match="record cannot be created: PermissionError"):
        s3_store.create("record", b"x")
    with pytest.raises(StoreError, match="record cannot be read: PermissionError"):
        s3_store.get("record")


def test_s3_probe_of_server_that_ignores_conditions_is_refused(s3, s3_store):
    def ignore_conditions(environ, start):
        environ.pop("HTTP_IF_NONE_MATCH", None)
        return s3.serve(environ, start)

    s3.handler = ignore_conditions
    with pytest.raises(StoreError, match="conditional writes"):
        s3_store.probe("area")


def test_s3_missing_bucket_is_an_error_and_not_empty(s3):
    with pytest.raises(StoreError, match="listed"):
        ObjectStore("s3://no-such-bucket/x").list()
