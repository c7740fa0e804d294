"""What open_checkpoint refuses in the first minute, and that the message names the file and the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, T5Config

from srr_dist.checkpoint.graph import build_graph
from srr_dist.checkpoint.source import open_checkpoint
from srr_dist.errors import CheckpointError

UP_PROJ = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A single-file checkpoint to damage."""
    return shutil.copytree(llama, tmp_path / "single")


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    """A sharded checkpoint to damage."""
    return shutil.copytree(sharded, tmp_path / "shards")


def refused(model: Path | str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(model))
    assert str(caught.value).startswith(str(model))


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such file or folder, and not a hub id")


def test_revision_of_a_local_folder_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="revision 'main' given, but only hub ids have revisions"):
        open_checkpoint(str(folder), revision="main")


def test_url_without_objects_is_refused() -> None:
    refused("memory://nowhere/at-all", "cannot reach memory://nowhere/at-all: FileNotFoundError")


def test_folder_without_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, r"no config\.json")


def test_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, r"neither model\.safetensors nor model\.safetensors\.index\.json among its \d+ files")


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"only pickled weights \(pytorch_model\.bin\); convert them .* safetensors")


def test_missing_shard_is_refused(shards: Path) -> None:
    name = sorted(shards.glob("model-*"))[1].name
    (shards / name).unlink()
    refused(shards, f"shard {name} is named by .* but missing")


def test_index_that_places_a_tensor_in_the_wrong_shard_is_refused(shards: Path) -> None:
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"][UP_PROJ] = first
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(shards, f"places tensor {UP_PROJ} in {first}, which lacks it")


def test_index_without_a_weight_map_is_refused(shards: Path) -> None:
    (shards / "model.safetensors.index.json").write_text("[]")
    refused(shards, r"model\.safetensors\.index\.json: expected JSON with a weight_map")


def test_truncated_shard_is_refused(shards: Path) -> None:
    path = sorted(shards.glob("model-*"))[2]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    refused(shards, rf"{path.name}: truncated: header ends at byte \d+, file has \d+")


def test_missing_tensor_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(UP_PROJ))
    refused(folder, f"lacks 1 tensors that LlamaForCausalLM needs, first {UP_PROJ}")


def test_missing_head_is_refused_unless_it_is_tied(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight"))
    refused(folder, r"lacks 1 tensors .* first lm_head\.weight")
    change_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(str(folder)).tensors


def test_tensor_of_another_shape_is_refused(folder: Path) -> None:
    change_config(folder, intermediate_size=96)
    refused(
        folder, r"model\.safetensors: tensor model\.layers\.0\.mlp\.\w+\.weight is F32 \[.*128.*\], the model expects"
    )


def test_integers_where_the_model_has_weights_are_refused(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({UP_PROJ: t[UP_PROJ].to(torch.int32)}))
    refused(folder, rf"tensor {UP_PROJ} is I32 \[128, 64\], the model expects torch.float32 .*weights are packed")


def test_float8_weights_are_refused(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({UP_PROJ: t[UP_PROJ].to(torch.float8_e4m3fn)}))
    refused(folder, rf"model\.safetensors: tensor {UP_PROJ} has dtype F8_E4M3, supported are F64, F32")


def test_one_tensor_under_two_names_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"norm.weight": t["model.norm.weight"].clone()}))
    refused(folder, r"tensors \S*norm\.weight and \S*norm\.weight are both model\.norm\.weight of the model")


def test_quantized_checkpoint_is_refused(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(folder, r"already quantized \(quantization_config, method gptq\); start from the original weights")


def test_configuration_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, r"config\.json: not valid JSON")


def test_configuration_without_a_model_type_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 64}')
    refused(folder, r"config\.json: no model_type")


def test_remote_code_is_refused(folder: Path) -> None:
    change_config(folder, model_type="their_model", auto_map={"AutoModelForCausalLM": "modeling_their.Model"})
    refused(folder, r"model_type 'their_model' is code that comes with the checkpoint \(auto_map\)")


def test_unknown_model_type_is_refused(folder: Path) -> None:
    change_config(folder, model_type="no_such_model")
    refused(folder, "model_type 'no_such_model' is unknown")


def test_encoder_decoder_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(T5Config().to_json_string())
    refused(folder, "model_type 't5' is not a decoder-only language model")


def test_model_without_a_list_of_blocks_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert", "is_decoder": true, "num_hidden_layers": 2}')
    refused(folder, "BertLMHeadModel: expected one list of 2 decoder blocks")


def test_fused_experts_are_refused(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    refused(tmp_path, r"MixtralForCausalLM holds it merged into model\.layers\.0\.mlp\.experts")


def test_blocks_without_linear_layers_are_refused_by_the_graph(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"block transformer\.h\.0: it has no linear layers"):
        build_graph(open_checkpoint(str(tmp_path)))
