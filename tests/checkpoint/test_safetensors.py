"""The header parser against literal bytes, and against headers that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srr_dist.checkpoint.safetensors import parse_header, read_layout
from srr_dist.errors import CheckpointError

HEADER = (
    b'{"__metadata__":{"format":"pt"},'
    b'"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[8,20]},'
    b'"a":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}'
)
FILE = len(HEADER).to_bytes(8, "little") + HEADER + bytes(20)


def test_header_of_literal_bytes_gives_absolute_offsets_in_file_order() -> None:
    entries = parse_header("x.safetensors", len(FILE), HEADER)
    start = 8 + len(HEADER)
    found = [(entry.name, entry.dtype, entry.shape, entry.start, entry.stop) for entry in entries]
    assert found == [("a", "I64", (), start, start + 8), ("b", "BF16", (2, 3), start + 8, start + 20)]


def one(**fields: Any) -> bytes:
    return json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}).encode()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"w": ', r"header is not valid JSON"),
        (b"\xff{}", r"header is not valid JSON"),
        (b"[]", r"header is a JSON list, expected an object"),
        (b'{"w": 3}', r"tensor w is described by 3"),
        (HEADER.replace(b'"b"', b'"a"'), r"a name occurs twice"),
        (one(dtype="F8_E5M2"), r"tensor w has dtype F8_E5M2, supported are"),
        (one(shape=[3]), r"tensor w has bytes 0 to 8, expected 12 bytes for F32 \[3\]"),
        (one(shape=[-2]), r"tensor w is described by"),
        (one(shape=[True]), r"tensor w is described by"),
        (one(data_offsets=[8, 0]), r"tensor w has bytes 8 to 0, expected 8"),
        (one(data_offsets=[-8, 0]), r"tensor w has bytes -8 to 0"),
        (one(data_offsets=[4, 12]), r"tensor w starts at byte \d+, expected \d+; .* leaves a gap"),
        (one(data_offsets=[0, 8, 16]), r"tensor w is described by"),
    ],
)
def test_header_that_lies_is_refused(header: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^x\.safetensors: .*{message}"):
        parse_header("x.safetensors", 8 + len(header) + 8, header)


def test_tensors_that_overlap_are_refused() -> None:
    header = HEADER.replace(b"[8,20]", b"[4,16]")
    with pytest.raises(CheckpointError, match=r"tensor b starts at byte \d+, expected \d+; its neighbour overlaps it"):
        parse_header("x.safetensors", len(FILE), header)


@pytest.mark.parametrize(("change", "state"), [(-1, "truncated"), (1, "followed by bytes of no tensor")])
def test_file_of_another_length_than_its_header_says_is_refused(change: int, state: str) -> None:
    with pytest.raises(CheckpointError, match=f"x.safetensors: {state}: header ends at byte {len(FILE)}"):
        parse_header("x.safetensors", len(FILE) + change, HEADER)


@given(st.binary(max_size=200) | st.integers(0, len(HEADER) - 1).map(lambda cut: HEADER[:cut]))
def test_header_of_any_bytes_is_parsed_or_refused(header: bytes) -> None:
    try:
        entries = parse_header("x.safetensors", 8 + len(header) + 20, header)
    except CheckpointError as error:
        assert str(error).startswith("x.safetensors: ")
    else:
        assert sum(entry.nbytes for entry in entries) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are too few for its header"),
        (b"\x10\0\0\0\0\0\0\0{}", r"10 bytes are too few for its header \(24 bytes\)"),
        (b"\xff" * 8 + b"{}", "10 bytes are too few for its header"),
    ],
)
def test_file_shorter_than_the_header_it_announces_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}"):
        read_layout(str(tmp_path))


def test_header_above_the_limit_of_the_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)
    with pytest.raises(CheckpointError, match=r"header of 100000009 bytes is above the format's limit"):
        read_layout(str(tmp_path))


def test_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    names = [f"layer.{index}.{'x' * 200}" for index in range(2000)]
    described = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [index, index + 1]} for index, name in enumerate(names)
    }
    header = json.dumps(described).encode()
    assert len(header) > 256 * 1024
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(len(names)))
    assert [entry.name for entry in read_layout(str(tmp_path)).entries] == names
