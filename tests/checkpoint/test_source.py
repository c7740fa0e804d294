"""A checkpoint reads the same wherever it lies and however its files are cut and named."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import build_graph
from srr_dist.checkpoint.source import TensorEntry, open_checkpoint
from srr_dist.errors import CheckpointError
from tests.families import build


def renamed(folder: Path, target: Path, rename: dict[str, str]) -> Path:
    """A copy of a single-file checkpoint whose tensor names have prefixes replaced."""
    shutil.copytree(folder, target)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next(prefix for prefix in rename if name.startswith(prefix))
        tensors[rename[old] + name.removeprefix(old)] = tensor
    save_file(tensors, target / "model.safetensors")
    return target


def test_read_returns_the_stored_bits_in_the_stored_dtype(tmp_path: Path) -> None:
    folder = build("llama", tmp_path, dtype=torch.bfloat16)
    expected = load_file(folder / "model.safetensors")
    found = open_checkpoint(str(folder)).read(expected)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name


def test_sharded_checkpoint_reads_the_tensors_of_the_single_file(llama: Path, sharded: Path) -> None:
    one, many = open_checkpoint(str(llama)), open_checkpoint(str(sharded))
    assert len({entry.file for entry in many.tensors.values()}) > 3
    assert many.total_bytes > one.total_bytes  # each shard has its own header
    expected = one.read(one.tensors)
    for name, tensor in many.read(many.tensors).items():
        assert torch.equal(tensor, expected[name]), name


def test_read_of_an_unknown_name_is_refused(llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tensor model\.layers\.9\.mlp\.up_proj\.weight"):
        open_checkpoint(str(llama)).read(["model.layers.9.mlp.up_proj.weight"])


def test_read_after_a_file_shrank_is_refused(tmp_path: Path) -> None:
    folder = build("llama", tmp_path)
    checkpoint = open_checkpoint(str(folder))
    last = max(checkpoint.tensors.values(), key=lambda entry: entry.stop)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(last.stop - 1)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected \d+ bytes at offset \d+"):
        checkpoint.read([last.name])


def test_read_after_a_file_is_gone_is_refused(tmp_path: Path) -> None:
    folder = build("llama", tmp_path)
    checkpoint = open_checkpoint(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a file is gone .*model\.safetensors"):
        checkpoint.read(list(checkpoint.tensors)[:1])


def test_entry_describes_where_a_tensor_lies(llama: Path) -> None:
    entry = open_checkpoint(str(llama)).tensors["model.norm.weight"]
    assert entry == TensorEntry(
        name="model.norm.weight",
        file="model.safetensors",
        start=entry.start,
        stop=entry.start + 64 * 4,
        shape=(64,),
        dtype="F32",
        stored_name="model.norm.weight",
        stored_shape=(64,),
    )


def test_checkpoint_pickles_small_and_reads_in_its_new_life(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    pickled = pickle.dumps(checkpoint)
    assert len(pickled) < 20_000
    name = "model.embed_tokens.weight"
    assert torch.equal(pickle.loads(pickled).read([name])[name], checkpoint.read([name])[name])


def test_identity_is_the_bytes_and_not_the_place(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    expected = open_checkpoint(str(llama)).identity
    assert open_checkpoint(str(copy)).identity == expected
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert open_checkpoint(str(copy)).identity != expected


def test_identity_changes_with_the_configuration(llama: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert open_checkpoint(str(copy)).identity != open_checkpoint(str(llama)).identity


def test_memory_url_reads_as_the_local_folder_does(sharded: Path) -> None:
    fsspec.filesystem("memory").put(str(sharded), "/models/sharded", recursive=True)
    local, remote = open_checkpoint(str(sharded)), open_checkpoint("memory://models/sharded/")
    assert remote.identity == local.identity
    assert remote.tensors == local.tensors
    assert remote.companions() == local.companions()
    assert all(torch.equal(tensor, local.read([name])[name]) for name, tensor in remote.read(local.tensors).items())


def test_s3_url_reads_as_the_local_folder_does(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        bucket = fsspec.filesystem("s3", skip_instance_cache=True)
        bucket.mkdir("models")
        bucket.put(str(sharded), "models/llama", recursive=True)
        local, remote = open_checkpoint(str(sharded)), open_checkpoint("s3://models/llama")
        assert remote.identity == local.identity
        names = list(local.tensors)
        expected = local.read(names)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in remote.read(names).items())
    finally:
        server.stop()


def test_companions_are_the_configuration_and_tokenizer_but_no_weights(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "copy")
    (folder / "LICENSE").write_text("permissive")
    (folder / "adapter_config.json").write_text("{}")
    companions = open_checkpoint(str(folder)).companions()
    assert companions.keys() == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE",
    }
    assert companions["config.json"] == (folder / "config.json").read_bytes()


def test_tokenizer_is_the_one_beside_the_weights(llama: Path) -> None:
    text = "The mills on the river — 1874"
    assert open_checkpoint(str(llama)).tokenizer()(text) == AutoTokenizer.from_pretrained(llama)(text)


def test_tokenizer_missing_is_refused(tmp_path: Path) -> None:
    folder = build("llama", tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no usable tokenizer beside the weights"):
        open_checkpoint(str(folder)).tokenizer()


def test_names_without_the_base_prefix_are_mapped(tmp_path: Path) -> None:
    folder = build("opt", tmp_path / "full")
    bare = renamed(folder, tmp_path / "bare", {"model.decoder.": "decoder."})
    checkpoint = open_checkpoint(str(bare))
    entry = checkpoint.tensors["model.decoder.embed_tokens.weight"]
    assert entry.stored_name == "decoder.embed_tokens.weight"
    assert checkpoint.tensors.keys() == open_checkpoint(str(folder)).tensors.keys()


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_names_of_a_multimodal_parent_are_mapped_to_the_text_model(tmp_path: Path, prefix: str) -> None:
    folder = build("gemma3", tmp_path / "text")
    nested = renamed(folder, tmp_path / "nested", {"model.": prefix})
    found, expected = open_checkpoint(str(nested)), open_checkpoint(str(folder))
    assert found.tensors.keys() == expected.tensors.keys()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found.read([name])[name], expected.read([name])[name])


def test_stored_tensors_without_a_place_are_ignored_and_logged(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(llama, tmp_path / "copy")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(load_file(llama / "model.safetensors") | extra, copy / "model.safetensors")
    checkpoint = open_checkpoint(str(copy))
    assert checkpoint.tensors.keys() == open_checkpoint(str(llama)).tensors.keys()
    assert "1 stored tensors have no place in the model" in caplog.text


def test_multimodal_checkpoint_runs_its_text_decoder(tmp_path: Path) -> None:
    text = json.loads((build("gemma3", tmp_path / "text") / "config.json").read_text())
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "multimodal")
    checkpoint = open_checkpoint(str(tmp_path / "multimodal"))
    graph = build_graph(checkpoint)
    assert [block.name for block in graph.blocks] == [f"model.language_model.layers.{index}" for index in range(4)]
    assert any(name.startswith("model.vision_tower.") for name in graph.rest)
    ids = torch.arange(10, 34).reshape(2, 12)
    decoder = Decoder(checkpoint, dtype=torch.float32)
    decoder.load_embedding()
    decoder.load_head()
    with torch.no_grad():
        h = decoder.embed(ids)
        for index in range(4):
            decoder.load_block(index)
            h = decoder.run_block(index, h)
        assert torch.equal(decoder.logits(h), model(ids, use_cache=False).logits)


def test_read_nan_weight_is_refused_by_file_and_tensor(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(llama, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0], tensors[name][1, 2] = float("nan"), float("-inf")
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(folder))
    assert "model.norm.weight" in checkpoint.read(["model.norm.weight"])
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: tensor {name}: 2 of \d+ values are NaN or infinite"
    ):
        checkpoint.read([name])
