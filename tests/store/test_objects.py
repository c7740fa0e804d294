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

from srr_dist.errors import StoreError
from srr_dist.store import FileEntry, ObjectStore

WRITERS = 8
PROCESSES = 4
LARGE = 101 * 2**20  # s3fs sends parts from 100 MiB on


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


def test_replace_of_the_expected_content_writes_and_of_another_does_not(store):
    store.put("a", b"first")
    assert store.replace("a", b"first", b"second") is True
    assert store.replace("a", b"first", b"third") is False
    assert store.get("a") == b"second"


def test_replace_missing_object_does_not_make_it(store):
    assert store.replace("folder/a", b"", b"x") is False
    assert store.replace("folder/a", b"", b"") is False
    assert store.list() == {}


def test_replace_by_the_same_content_again_counts_as_ours(store):
    store.put("a", b"first")
    assert store.replace("a", b"first", b"second")
    assert store.replace("a", b"first", b"second")


def write(store, kind, path, content):
    """``create``, or ``replace`` of what is there."""
    return store.create(path, content) if kind == "create" else store.replace(path, b"old", content)


@pytest.mark.parametrize("kind", ["create", "replace"])
def test_conditional_write_by_threads_has_one_winner(store, eager_switching, kind):
    together = Barrier(WRITERS)
    contents = [f"writer {i}".encode() for i in range(WRITERS)]
    rounds = 2 if store.url.startswith("s3:") else 20

    def write_together(path: str, content: bytes) -> bool:
        together.wait()
        return write(store, kind, path, content)

    with ThreadPoolExecutor(WRITERS) as pool:
        for path in map(str, range(rounds)):
            if kind == "replace":
                store.put(path, b"old")
            won = list(pool.map(partial(write_together, path), contents))
            assert won.count(True) == 1
            assert store.get(path) == contents[won.index(True)]


@pytest.fixture
def eager_switching():
    """Lets threads take turns so often that two steps of one are seldom left together."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_conditional_write_by_processes_has_one_winner(shared_store):
    spawn = multiprocessing.get_context("spawn")
    together = spawn.Barrier(PROCESSES)
    outcomes = spawn.SimpleQueue()
    shared_store.put("replace", b"old")
    processes = [
        spawn.Process(target=_write_together, args=(shared_store, together, f"writer {i}".encode(), outcomes))
        for i in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    answers = [outcomes.get() for _ in range(2 * PROCESSES)]
    for process in processes:
        process.join()
    for kind in ("create", "replace"):
        won = {content: success for each, content, success in answers if each == kind}
        assert sorted(won.values()) == [False] * (PROCESSES - 1) + [True]
        assert won[shared_store.get(kind)]


def _write_together(store, together, content, outcomes):
    for kind in ("create", "replace"):
        together.wait()
        outcomes.put((kind, content, write(store, kind, kind, content)))


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


@pytest.mark.parametrize("url", ["nosuch://host/x", "s3://", "simplecache::s3://bucket/x", "s3://key:word@bucket/x"])
def test_store_of_unusable_url_is_refused(url):
    with pytest.raises(StoreError, match="no such kind of storage") as refused:
        ObjectStore(url)
    assert "word" not in str(refused.value)


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


@pytest.mark.parametrize("kind", ["create", "replace"])
def test_s3_conditional_write_whose_answer_is_lost_is_ours_by_content(s3, s3_store, kind):
    s3_store.put("replace", b"old")
    puts = []

    def lose_first_answer(environ, start):
        if environ["REQUEST_METHOD"] != "PUT":
            return s3.serve(environ, start)
        puts.append(environ["PATH_INFO"])
        return s3.lose_answer(environ, start) if len(puts) == 1 else s3.serve(environ, start)

    s3.handler = lose_first_answer
    assert write(s3_store, kind, kind, b"nonce 1") is True
    assert len(puts) == 2, "the client was expected to send the write again"
    assert write(s3_store, kind, kind, b"nonce 2") is False
    assert s3_store.get(kind) == b"nonce 1"


@pytest.mark.parametrize("kind", ["create", "replace"])
def test_s3_conditional_write_told_to_try_again_does(s3, s3_store, kind):
    s3_store.put("replace", b"old")
    puts = []

    def conflict_first(environ, start):
        if environ["REQUEST_METHOD"] != "PUT":
            return s3.serve(environ, start)
        puts.append(environ["PATH_INFO"])
        if len(puts) == 1:
            return s3.refuse("409 Conflict", "ConditionalRequestConflict", environ, start)
        return s3.serve(environ, start)

    s3.handler = conflict_first
    assert write(s3_store, kind, kind, b"x") is True
    assert len(puts) == 2
    assert s3_store.get(kind) == b"x"


def test_s3_large_object_is_stored_in_parts_and_its_name_is_taken(seaweed_store, tmp_path):
    content = os.urandom(2**20) * (LARGE // 2**20)
    file = tmp_path / "large"
    file.write_bytes(content)
    entry = seaweed_store.upload(file, "a")
    assert entry == FileEntry("a", LARGE, hashlib.sha256(content).hexdigest())
    assert "-" in seaweed_store._backend.read_versioned("a")[1], "an upload in parts has an ETag that says so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(seaweed_store), "get", lambda *_: b"")  # no need to compare the contents too
        assert seaweed_store.create("a", content[::-1]) is False
    assert seaweed_store.get_range("a", LARGE - 9, LARGE) == content[-9:]


def test_s3_refusal_names_the_object_and_is_no_conflict(s3, s3_store):
    s3.handler = lambda environ, start: s3.refuse("403 Forbidden", "AccessDenied", environ, start)
    with pytest.raises(StoreError, match="record cannot be created: PermissionError"):
        s3_store.create("record", b"x")
    with pytest.raises(StoreError, match="record cannot be read: PermissionError"):
        s3_store.get("record")


@pytest.mark.parametrize("condition", ["HTTP_IF_NONE_MATCH", "HTTP_IF_MATCH"])
def test_s3_probe_of_server_that_ignores_a_condition_is_refused(s3, s3_store, condition):
    def ignore_condition(environ, start):
        environ.pop(condition, None)
        return s3.serve(environ, start)

    s3.handler = ignore_condition
    with pytest.raises(StoreError, match=r"in spite of their condition.*If-Match.*--single-driver"):
        s3_store.probe("area")
    assert s3_store.list() == {}


def test_s3_probe_of_server_that_refuses_conditions_is_refused(s3, s3_store):
    s3.handler = s3.refuse_conditions
    with pytest.raises(StoreError, match=r"conditional writes fail: .*refused by the test.*--single-driver"):
        s3_store.probe("area")
    assert s3_store.list() == {}


def test_s3_probe_without_the_right_to_write_does_not_speak_of_conditions(s3, s3_store):
    s3.handler = lambda environ, start: s3.refuse("403 Forbidden", "AccessDenied", environ, start)
    with pytest.raises(StoreError, match="cannot be written: PermissionError") as refused:
        s3_store.probe("area")
    assert "condition" not in str(refused.value)


@pytest.mark.parametrize("server", ["ignore_conditions", "refuse_conditions"])
def test_s3_single_driver_looks_before_it_writes(s3, s3_store, server):
    s3.handler = getattr(s3, server)
    store = pickle.loads(pickle.dumps(ObjectStore(s3_store.url, single_driver=True)))
    store.probe("area")
    assert store.list() == {}
    assert store.create("a", b"first") is True
    assert store.create("a", b"second") is False
    assert store.replace("a", b"other", b"third") is False
    assert store.replace("a", b"first", b"third") is True
    assert store.replace("absent", b"", b"x") is False
    assert store.get("a") == b"third"


def test_s3_missing_bucket_is_an_error_and_not_empty(s3):
    with pytest.raises(StoreError, match="listed"):
        ObjectStore("s3://no-such-bucket/x").list()


@pytest.fixture
def linked_store(local_store, tmp_path):
    """A folder with symbolic links that lead out of it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    local_store.put("inside/a", b"x")
    folder = Path(local_store.url)
    (folder / "link").symlink_to(outside)
    (folder / "file").symlink_to(outside / "secret")
    (folder / "inside" / "up").symlink_to("../../outside")
    return local_store


@pytest.mark.parametrize("path", ["link/secret", "inside/up/secret", "file"])
def test_local_symbolic_link_out_of_the_store_is_not_followed(linked_store, tmp_path, path):
    file = tmp_path / "upload"
    file.write_bytes(b"new")
    operations = [
        lambda: linked_store.get(path),
        lambda: linked_store.size(path),
        lambda: linked_store.put(path, b"new"),
        lambda: linked_store.create(path, b"new"),
        lambda: linked_store.replace(path, b"secret", b"new"),
        lambda: linked_store.upload(file, path),
        lambda: linked_store.copy("inside/a", path),
        lambda: linked_store.copy(path, "stolen"),
        lambda: linked_store.delete(path),
        lambda: linked_store.delete_tree(path),
        lambda: linked_store.list(path),
        lambda: linked_store.discard_unfinished(path),
    ]
    for operation in operations:
        with pytest.raises(StoreError, match="a symbolic link leads out of"):
            operation()
    assert linked_store.list() == {"inside/a": 1}
    linked_store.delete_tree("inside")
    assert {file.name: file.read_bytes() for file in (tmp_path / "outside").iterdir()} == {"secret": b"secret"}


def test_local_folder_that_is_itself_reached_through_a_link_is_fine(local_store, tmp_path):
    local_store.put("a", b"x")
    (tmp_path / "alias").symlink_to(local_store.url)
    alias = ObjectStore(str(tmp_path / "alias"))
    alias.put("b/c", b"y")
    assert local_store.list() == {"a": 1, "b/c": 1}
