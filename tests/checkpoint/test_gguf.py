"""A GGUF file gives the bits that transformers gives, without being loaded whole."""

from __future__ import annotations

from pathlib import Path

import fsspec
import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from srr_dist.checkpoint.gguf import _BoundedReader, companions
from srr_dist.checkpoint.graph import build_graph
from srr_dist.checkpoint.source import Checkpoint, open_checkpoint
from srr_dist.errors import CheckpointError
from tests.families import build_gguf

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def checkpoint(file: Path) -> Checkpoint:
    return open_checkpoint(str(file))


def test_gguf_tensors_equal_what_transformers_loads(file: Path, checkpoint: Checkpoint) -> None:
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    found = checkpoint.read(checkpoint.tensors)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


def test_gguf_configuration_is_transformers_own_in_float32(file: Path, checkpoint: Checkpoint) -> None:
    expected = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    found = checkpoint.config.to_dict()
    assert found.pop("dtype") == "float32"
    assert found.pop("architectures") == ["LlamaForCausalLM"]
    for field in ("dtype", "architectures", "_name_or_path"):
        del expected[field]
    assert found.pop("_name_or_path") == ""
    assert found == expected


def test_gguf_companions_hold_a_tokenizer_equal_to_transformers_own(file: Path, checkpoint: Checkpoint) -> None:
    text = "The river rises in 1874.\nIts mills — ruins"
    expected = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(text)["input_ids"]
    assert checkpoint.companions().keys() >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert checkpoint.tokenizer()(text)["input_ids"] == expected


def test_gguf_entries_record_type_and_bytes_of_the_file(checkpoint: Checkpoint) -> None:
    entry = checkpoint.tensors[Q_PROJ]
    assert (entry.dtype, entry.stored_name, entry.file) == ("GGUF:Q8_0", "blk.0.attn_q.weight", "")
    assert entry.shape == (64, 64)
    assert entry.nbytes == 64 * 64 // 32 * 34  # Q8_0: 32 values in 34 bytes


def test_gguf_graph_has_the_blocks_of_the_safetensors_model(checkpoint: Checkpoint) -> None:
    graph = build_graph(checkpoint)
    assert [block.name for block in graph.blocks] == [f"model.layers.{index}" for index in range(4)]
    assert graph.rest == ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def test_gguf_at_a_remote_location_is_read_by_ranges_to_the_same_checkpoint(
    file: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srr_dist.checkpoint.gguf._FIRST_BYTES", 1000)  # several prefixes until the header is whole
    fsspec.filesystem("memory").pipe_file("/gguf/other-name.gguf", file.read_bytes())
    remote = open_checkpoint("memory://gguf/other-name.gguf")
    assert remote.identity == checkpoint.identity
    assert remote.tensors == checkpoint.tensors
    assert torch.equal(remote.read([Q_PROJ])[Q_PROJ], checkpoint.read([Q_PROJ])[Q_PROJ])


def test_gguf_truncated_in_its_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cut\.gguf: not a readable GGUF file, or truncated"):
        open_checkpoint(str(build_gguf(tmp_path / "cut.gguf", truncate=100)))


def test_gguf_truncated_at_a_remote_location_is_refused(tmp_path: Path) -> None:
    content = build_gguf(tmp_path / "cut.gguf", truncate=100).read_bytes()
    fsspec.filesystem("memory").pipe_file("/gguf/cut.gguf", content)
    with pytest.raises(CheckpointError, match="truncated"):
        open_checkpoint("memory://gguf/cut.gguf")


def test_gguf_of_an_architecture_transformers_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="GGUF architecture 'clip' is not one that transformers loads"):
        open_checkpoint(str(build_gguf(tmp_path / "clip.gguf", architecture="clip")))


def test_gguf_of_other_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.gguf").write_bytes(b"not a model at all" * 10)
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        open_checkpoint(str(tmp_path / "noise.gguf"))


def test_transformers_reads_headers_within_their_bounds_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srr_dist.checkpoint.gguf._MAX_READS", 3)
    with pytest.raises(CheckpointError, match=r"transformers cannot derive its tokenizer: .* are one of 4 values"):
        companions(str(file))
    assert gguf.GGUFReader is not _BoundedReader
