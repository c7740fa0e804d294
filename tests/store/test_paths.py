"""Names of objects are a boundary: nothing outside the store can be named."""

import posixpath

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from srr_dist.errors import StoreError
from srr_dist.store.paths import check_path, check_segment

OUTSIDE = [
    "",
    ".",
    "..",
    "/",
    "/etc/passwd",
    "../a",
    "a/..",
    "a/../b",
    "a/./b",
    "a//b",
    "a/",
    "//host/share",
    "a\\b",
    "..\\a",
    "C:\\a",
    "C:/a",
    "s3://bucket/a",
    "file:/etc/passwd",
    "simplecache::a",
    "a\0",
    "a\n",
    "~/a\t",
    "a?versionId=1",
    "a/*",
    "a[1]",
    "é",
    "\ud800",
    ".tmp-1",
    "a/.tmp-0123456789abcdef",
]
INSIDE = ["a", "a/b/c.json", ".srr/0a1b/run.json", "...", "a..b/..c", "model-00001-of-00032.safetensors", "a b+c=d@e_f"]


@pytest.mark.parametrize("path", INSIDE)
def test_path_inside_the_store_is_taken_as_it_is(path):
    assert check_path(path) == path


@pytest.mark.parametrize("path", OUTSIDE)
def test_path_that_could_mean_another_place_is_refused(path):
    with pytest.raises(StoreError, match="path"):
        check_path(path)


@pytest.mark.parametrize("path", OUTSIDE)
def test_every_operation_refuses_such_a_path(memory_store, tmp_path, path):
    file = tmp_path / "file"
    file.write_bytes(b"x")
    memory_store.put("fine", b"x")
    operations = {
        "get": lambda: memory_store.get(path),
        "get_range": lambda: memory_store.get_range(path, 0, 1),
        "get_json": lambda: memory_store.get_json(path),
        "exists": lambda: memory_store.exists(path),
        "size": lambda: memory_store.size(path),
        "put": lambda: memory_store.put(path, b"x"),
        "create": lambda: memory_store.create(path, b"x"),
        "upload": lambda: memory_store.upload(file, path),
        "copy from": lambda: memory_store.copy(path, "b"),
        "copy to": lambda: memory_store.copy("fine", path),
        "delete": lambda: memory_store.delete(path),
        "delete_tree": lambda: memory_store.delete_tree(path),
        "discard_unfinished": lambda: memory_store.discard_unfinished(path),
        "replace": lambda: memory_store.replace(path, b"x", b"y"),
        "sha256": lambda: memory_store.sha256(path),
        "list": lambda: memory_store.list(path),
    }
    if path == "":  # where it means everything
        del operations["list"], operations["discard_unfinished"]
    for name, operation in operations.items():
        with pytest.raises(StoreError, match="not allowed"):
            operation()
            pytest.fail(f"{name} took {path!r}")
    assert memory_store.list() == {"fine": 1}


@given(st.one_of(st.text(), st.text(alphabet="ab./\\:~ \0-")))
@example("a/../../b")
def test_any_text_is_refused_or_stays_below_the_root(path):
    try:
        checked = check_path(path)
    except StoreError:
        return
    joined = posixpath.join("/root", checked)
    assert posixpath.normpath(joined) == joined
    assert joined.startswith("/root/")
    assert checked.isascii()


@pytest.mark.parametrize("name", ["a/b", "", "..", "a\\b"])
def test_segment_with_a_folder_in_it_is_refused(name):
    with pytest.raises(StoreError, match="path"):
        check_segment(name)
