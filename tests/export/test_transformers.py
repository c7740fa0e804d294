"""Outputs loaded by transformers and PEFT hold exactly the weights and adapters that were committed."""

import pytest
import torch
from peft import PeftModel
from random_runs import Recipe, commit_run, llama_config
from transformers import AutoModelForCausalLM, OPTConfig, Qwen3Config

from srr_dist.export.assemble import assemble
from srr_dist.export.base import dequantized
from srr_dist.store.objects import ObjectStore

EXCLUDED = "layers.1.mlp.up_proj"


def uneven_rank(name):
    """Ranks that differ between layers, a layer without adapter, and an excluded one."""
    if name.endswith((EXCLUDED, "layers.1.fc1")):
        return None
    return {"q_proj": 3, "o_proj": 0, "out_proj": 0}.get(name.rpartition(".")[2], 6 if "layers.0" in name else 5)


def qwen3_config(**options):
    return Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, **options,
    )  # fmt: skip


def opt_config(**options):
    return OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=64, **options,
    )  # fmt: skip


CONFIGS = {
    "llama-tied": lambda **options: llama_config(tie_word_embeddings=True, **options),
    "llama-untied": lambda **options: llama_config(tie_word_embeddings=False, **options),
    "qwen3": qwen3_config,
    "opt": opt_config,
}
GRIDS = {
    "mxint3": Recipe(3, 32, True, uneven_rank),
    "int4": Recipe(4, 32, False, uneven_rank),
    "int2-channel": Recipe(2, -1, False, uneven_rank),
    "int-asym4": Recipe(4, 32, False, uneven_rank, symmetric=False),
    "int-asym3-channel": Recipe(3, -1, False, uneven_rank, symmetric=False),
    "int-asym8": Recipe(8, 16, False, uneven_rank, symmetric=False),
    "int2-to-5": Recipe(2, 32, False, uneven_rank, others=(("v_proj", 5), ("layers.0.mlp.up_proj", 3), ("fc2", 4))),
    "mxint3-and-8": Recipe(3, 32, True, uneven_rank, others=(("q_proj", 8), ("fc1", 4))),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("grid_name", GRIDS)
def test_output_loaded_by_transformers_and_peft_holds_the_committed_values(tmp_path, family, dtype, grid_name):
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, CONFIGS[family](dtype=dtype), GRIDS[grid_name])
    assemble(run.store, run.records, run.output, ["compressed"])

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base")
    if GRIDS[grid_name].others:
        base.hf_quantizer.compressor.decompress_model(base)
    expected = run.model.state_dict()
    for name, linear in run.linears.items():
        expected[f"{name}.weight"] = dequantized(linear.codes, linear.scale, dtype)
    found = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    if GRIDS[grid_name].others:  # scales stay there, and products are rounded in the type that was asked for
        found = {name: found[name] for name in expected}
        for name in run.linears:
            found[f"{name}.weight"] = found[f"{name}.weight"].bfloat16().to(dtype)
    assert {name: t.dtype for name, t in found.items()} == dict.fromkeys(expected, dtype)
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []

    model = PeftModel.from_pretrained(base, tmp_path / "out/adapter")
    adapted = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert set(adapted) == {name for name, linear in run.linears.items() if linear.L.shape[1]}
    for name, module in adapted.items():
        assert module.scaling == {"default": 1.0}
        assert torch.equal(module.lora_A["default"].weight, run.linears[name].R.float())
        assert torch.equal(module.lora_B["default"].weight, run.linears[name].L.float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_output_loaded_in_another_dtype_holds_the_bfloat16_value_cast(tmp_path, dtype, symmetric):
    recipe = Recipe(bits=4, power_of_two=False, symmetric=symmetric)
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="bfloat16"), recipe)
    assemble(run.store, run.records, run.output, ["compressed"])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base", dtype=dtype).state_dict()
    for name, linear in run.linears.items():
        assert torch.equal(found[f"{name}.weight"], dequantized(linear.codes, linear.scale).to(dtype))


@pytest.mark.parametrize("others", [(), (("k_proj", 6), ("layers.1.mlp.down_proj", 2))])
def test_merged_export_loads_as_an_ordinary_model(tmp_path, others):
    recipe = Recipe(rank=uneven_rank, others=others)
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="float32"), recipe)
    assemble(run.store, run.records, run.output, ["dense"])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out/dense").state_dict()
    expected = run.model.state_dict()
    for name, linear in run.linears.items():
        Q = dequantized(linear.codes, linear.scale, torch.float32)
        expected[f"{name}.weight"] = Q + linear.L.float() @ linear.R.float()
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
