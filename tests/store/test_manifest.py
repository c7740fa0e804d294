import hashlib
import json

import pytest
from examples import FINGERPRINT, SHA256, manifest

from srr_dist.errors import OutputError, StoreError
from srr_dist.store import FileEntry, Manifest, read_complete, write_commit

GOLDEN = (
    '{"created_by":{"srr_dist":"0.1.0"},"exports":["base","adapter"],'
    f'"files":{{"base/config.json":{{"sha256":"{SHA256}","size":2}}}},'
    f'"fingerprint":"{FINGERPRINT}","format_version":1,'
    '"layers":{"model.layers.0.mlp.up_proj":{"bits":3,"k":3,"rank":16}},"unquantized":["lm_head"]}'
).encode()


def test_manifest_bytes_are_the_format():
    assert manifest().to_json() == GOLDEN
    assert Manifest.from_json(GOLDEN) == manifest()


def test_commit_bytes_are_the_format(store):
    write_commit(store, manifest())
    digest = hashlib.sha256(GOLDEN).hexdigest()
    assert store.get("COMMIT") == f'{{"manifest_sha256":"{digest}"}}'.encode()
    assert store.get("manifest.json") == GOLDEN


def test_commit_can_be_written_again_and_read(store):
    write_commit(store, manifest())
    write_commit(store, manifest())
    assert read_complete(store) == manifest()


def test_output_without_commit_is_unfinished(store):
    store.put("manifest.json", GOLDEN)
    with pytest.raises(OutputError, match="no COMMIT"):
        read_complete(store)


def test_output_whose_manifest_changed_after_commit_is_unfinished(store):
    write_commit(store, manifest())
    store.put("manifest.json", manifest(exports=["dense"]).to_json())
    with pytest.raises(OutputError, match="not finished or was changed"):
        read_complete(store)


def test_output_with_damaged_commit_names_it(store):
    write_commit(store, manifest())
    store.put("COMMIT", b'{"manifest_sha256":"00"}')
    with pytest.raises(StoreError, match="COMMIT: sha256 '00': expected 64"):
        read_complete(store)


def test_output_without_manifest_names_it(store):
    write_commit(store, manifest())
    store.delete("manifest.json")
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read: not found"):
        read_complete(store)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_manifest_of_another_version_says_which(version):
    document = json.loads(GOLDEN) | {"format_version": version, "a_new_field": 1}
    with pytest.raises(StoreError, match=f"format version {version!r}, expected 1"):
        Manifest.from_json(json.dumps(document).encode())


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "s3://b/x", "COMMIT", "manifest.json", ""])
def test_manifest_naming_a_file_it_may_not_is_refused(path):
    document = json.loads(GOLDEN)
    document["files"] = {path: {"size": 1, "sha256": SHA256}}
    with pytest.raises(StoreError, match=r"^out/manifest\.json: "):
        Manifest.from_json(json.dumps(document).encode(), "out/manifest.json")


def test_manifest_file_under_another_path_is_refused():
    with pytest.raises(StoreError, match="names 'base/b'"):
        manifest(files={"base/a": FileEntry("base/b", 1, SHA256)})


def test_manifest_with_negative_size_names_the_field():
    data = GOLDEN.replace(b'"size":2', b'"size":-2')
    with pytest.raises(StoreError, match=r"manifest\.json: files\.base/config\.json: .*size -2 is negative"):
        Manifest.from_json(data)
