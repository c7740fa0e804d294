"""Whatever the bytes: what reads a model's description and a recipe gives a result or a deliberate error, at once.

Damage is done to descriptions that are right, since bytes at random hardly get past the first check.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srr_dist.checkpoint import gguf, safetensors
from srr_dist.checkpoint.skeleton import parse_config
from srr_dist.config import RunConfig, load_recipe
from srr_dist.errors import CheckpointError, ConfigError, SrrError
from tests.families import build_gguf

HEADER = (
    b'{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}'
)
RECIPE = b"bits: 3\ngrid: mxint\nrank: 64\nmax_bad_rows: 0.01\ninclude: 'layers\\.[0-3]'\ndry-run: true\n"
EXTREMES = [0, 1, -1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1, 10**30, True, None, "", "x", [], {}, 0.5, "../x", "/x"]
MEMORY_BYTES = 2**30


@contextmanager
def little_memory() -> Iterator[None]:
    """Let no more than ``MEMORY_BYTES`` be asked of the system, so that a huge allocation fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def answers(read: Callable[[], object], refusal: type[SrrError]) -> None:
    with little_memory():
        try:
            read()
        except refusal as error:
            assert str(error)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with some bytes replaced, left out or doubled."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 16)))
        filling = draw(st.sampled_from([b"", content[start:stop] * 2]) | st.binary(max_size=9))
        content = content[:start] + filling + content[stop:]
    return content


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one of its parts replaced by an extreme one."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return value | {key: draw(altered(value[key]))}
    if isinstance(value, list) and value and draw(st.booleans()):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(altered(value[index])), *value[index + 1 :]]
    return draw(st.sampled_from(EXTREMES))


@given(damaged(HEADER) | altered(json.loads(HEADER)).map(lambda value: json.dumps(value).encode()))
def test_safetensors_header(header):
    answers(lambda: safetensors.parse_header("x", 8 + len(header) + 32, header), CheckpointError)


@pytest.fixture(scope="module")
def folder() -> str:
    """A folder of two shards in memory."""
    files = fsspec.filesystem("memory")
    for name in ("one", "two"):
        header = json.dumps({name: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}).encode()
        files.pipe_file(f"/fuzz/{name}.safetensors", len(header).to_bytes(8, "little") + header + b"12")
    files.pipe_file("/fuzz/config.json", b"{}")
    return "memory://fuzz"


INDEX = {"metadata": {"total_size": 4}, "weight_map": {"one": "one.safetensors", "two": "two.safetensors"}}


@given(altered(INDEX).map(lambda value: json.dumps(value).encode()) | damaged(json.dumps(INDEX).encode()))
def test_safetensors_index(folder, index):
    fsspec.filesystem("memory").pipe_file(f"/fuzz/{safetensors.INDEX}", index)
    answers(lambda: safetensors.read_layout(folder), CheckpointError)


@given(st.binary(max_size=64))
def test_safetensors_file(folder, content):
    files = fsspec.filesystem("memory")
    files.pipe_file(f"/fuzz/{safetensors.INDEX}", json.dumps(INDEX).encode())
    whole = files.cat_file("/fuzz/two.safetensors")
    files.pipe_file("/fuzz/two.safetensors", content)
    try:
        answers(lambda: safetensors.read_layout(folder), CheckpointError)
    finally:
        files.pipe_file("/fuzz/two.safetensors", whole)


CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
          "layer_types": ["full_attention"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
          "quantization_config": None, "text_config": {"num_hidden_layers": 2}}  # fmt: skip


@given(altered(CONFIG), st.sampled_from(["llama", "qwen2", "gemma2", "opt"]))
def test_configuration(fields, family):
    if isinstance(fields, dict) and fields.get("model_type") == "llama":
        fields["model_type"] = family
    answers(lambda: parse_config(json.dumps(fields)), CheckpointError)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    return build_gguf(tmp_path_factory.mktemp("fuzz") / "model.gguf").read_bytes()


@settings(max_examples=60)
@given(data=st.data())
def test_gguf_header(model, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    start = data.draw(st.integers(0, 12_000))
    number = data.draw(st.sampled_from([0, 1, 9, 255, 2**31, 2**32 - 1, 2**60, 2**64 - 1]))
    width = data.draw(st.sampled_from([1, 4, 8]))
    patch = (number % 2 ** (8 * width)).to_bytes(width, "little")
    path.write_bytes(model[:start] + patch + model[start + width :])
    answers(lambda: gguf._architecture(gguf._parse(path)), CheckpointError)


@given(damaged(RECIPE) | st.text(max_size=40).map(str.encode))
def test_recipe(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    answers(lambda: RunConfig.from_options({"model": "m", "output": "o"} | load_recipe(path)), ConfigError)


def test_recipe_that_doubles_itself_thirty_times(tmp_path):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30)), "bits: *a29"]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with little_memory(), pytest.raises(ConfigError, match="gives a0 a list, expected a single value"):
        load_recipe(tmp_path / "recipe.yaml")
