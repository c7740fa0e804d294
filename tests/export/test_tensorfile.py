"""Safetensors files in a store, against the safetensors package itself."""

import pytest
import safetensors
import safetensors.torch
import torch

from srr_dist.errors import StoreError
from srr_dist.export.tensorfile import TensorFile, encode_header
from srr_dist.store.objects import ObjectStore

TENSORS = {
    "codes": torch.arange(12, dtype=torch.int32).reshape(3, 4),
    "scale": torch.tensor([[0.5], [1.5]], dtype=torch.bfloat16),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "norm": torch.tensor([1.0, -2.0]),
}


@pytest.fixture
def store(tmp_path):
    store = ObjectStore(str(tmp_path))
    store.put("a/one.safetensors", safetensors.torch.save(TENSORS, metadata={"format": "pt"}))
    return store


def test_read_returns_every_tensor_and_the_metadata(store):
    file = TensorFile.open(store, "a/one.safetensors")
    found = file.read()
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert file.metadata == {"format": "pt"}
    assert file.size == store.size("a/one.safetensors")


def test_read_some_names_returns_only_those(store):
    found = TensorFile.open(store, "a/one.safetensors").read(["norm", "scale"])
    assert list(found) == ["norm", "scale"]
    assert torch.equal(found["norm"], TENSORS["norm"])


def test_encode_header_before_the_bodies_of_two_files_makes_one_valid_file(store, tmp_path):
    store.put("a/two.safetensors", safetensors.torch.save({"more": torch.ones(5)}))
    files = [TensorFile.open(store, f"a/{name}.safetensors") for name in ("one", "two")]
    header = encode_header([entry for file in files for entry in file.entries.values()], {"format": "pt"})
    bodies = [file.raw(len(file.header), file.size) for file in files]
    (tmp_path / "joined.safetensors").write_bytes(b"".join([header, *bodies]))
    joined = safetensors.torch.load_file(tmp_path / "joined.safetensors")
    assert joined.keys() == {*TENSORS, "more"}
    assert all(torch.equal(joined[name], tensor) for name, tensor in TENSORS.items())
    assert torch.equal(joined["more"], torch.ones(5))


def test_encode_header_golden_bytes(store):
    store.put("a/two.safetensors", safetensors.torch.save({"b": torch.ones(2), "a": torch.ones(1)}))
    entries = TensorFile.open(store, "a/two.safetensors").entries.values()
    text = (
        b'{"__metadata__":{"format":"pt"},"a":{"data_offsets":[0,4],"dtype":"F32","shape":[1]},'
        b'"b":{"data_offsets":[4,12],"dtype":"F32","shape":[2]}}     '
    )
    assert encode_header(entries, {"format": "pt"}) == len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:4],
        lambda data: b"",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
    ],
    ids=["truncated", "longer", "no length", "empty", "endless header", "no JSON"],
)
def test_open_damaged_file_is_a_store_error_that_names_it(store, damage):
    store.put("a/one.safetensors", damage(store.get("a/one.safetensors")))
    with pytest.raises(StoreError, match=r"one\.safetensors"):
        TensorFile.open(store, "a/one.safetensors")
