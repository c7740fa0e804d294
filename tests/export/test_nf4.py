"""Outputs of the grid nf4: what bitsandbytes reads, transformers and PEFT compute with, and verify finds."""

from __future__ import annotations

import json

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type
from peft import PeftModel
from random_runs import Recipe, commit_run, llama_config
from test_transformers import CONFIGS, uneven_rank
from test_verify import recommit, rewrite, spoil
from transformers import AutoModelForCausalLM

from srr_dist.config import NF4_BLOCKS
from srr_dist.export.assemble import assemble
from srr_dist.export.base import bits_per_weight, dense_tensors, quantized_linears
from srr_dist.export.load import QuantizedModel
from srr_dist.export.nf4 import nf4_config, nf4_shapes, nf4_tensors
from srr_dist.export.verify import verify_output
from srr_dist.solve import make_grid
from srr_dist.solve.normalfloat import VALUES, values
from srr_dist.store.objects import ObjectStore

NF4 = Recipe(4, 32, False, uneven_rank, codebook="nf4")
SHARD = "base/model-00002-of-00003.safetensors"
LINEAR = "model.layers.1.mlp.gate_proj"


def random_linear(m, n, group_size):
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(0, 16, (m, n), generator=generator, dtype=torch.int8)
    scale = torch.rand(m, n // group_size, generator=generator) / 9 + 1e-3
    return codes, torch.where(scale > 0.06, -scale, scale).bfloat16()


def parameter(name, tensors):
    """The weight of a linear as bitsandbytes holds it once it is read."""
    stats = {key.removeprefix(f"{name}.weight."): t for key, t in tensors.items() if key != f"{name}.weight"}
    return bitsandbytes.nn.Params4bit.from_prequantized(tensors[f"{name}.weight"], stats, device="cpu")


@pytest.fixture
def finished(tmp_path):
    """A sound output with every export, its run and its manifest."""
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, llama_config(dtype="bfloat16"), NF4)
    return run, assemble(run.store, run.records, run.output, ["compressed", "dense"])


def test_table_is_that_of_bitsandbytes():
    assert tuple(get_4bit_type("nf4", device="cpu").tolist()) == VALUES


@pytest.mark.parametrize("group_size", NF4_BLOCKS)
def test_stored_linear_is_read_by_bitsandbytes_as_the_grid_s_own_value(group_size):
    codes, scale = random_linear(5, max(128, group_size), group_size)
    tensors = nf4_tensors("lin", codes, scale)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == nf4_shapes("lin", *codes.shape, group_size)
    weight = parameter("lin", tensors)
    state = weight.quant_state
    assert (state.blocksize, tuple(state.shape), state.dtype) == (group_size, tuple(codes.shape), torch.bfloat16)
    read = dequantize_4bit(weight.data, state)
    assert torch.equal(read, make_grid("nf4", 4, group_size).dequantize(codes, scale).bfloat16())
    dense = dense_tensors(tensors, {})
    assert list(dense) == ["lin.weight"]
    assert torch.equal(dense["lin.weight"], read)


def test_codes_of_a_weight_are_those_that_bitsandbytes_chooses():
    W = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    W[:, ::64] = W.reshape(16, 2, 64).abs().amax(-1).bfloat16().float() * 1.25  # magnitudes without a rounding
    W = W.bfloat16().float()
    packed, state = bitsandbytes.functional.quantize_4bit(W, blocksize=64, quant_type="nf4")
    codes, scale = make_grid("nf4", 4, 64).quantize(W)
    tensors = nf4_tensors("lin", codes, scale)
    assert torch.equal(tensors["lin.weight.absmax"], state.absmax)
    assert torch.equal(tensors["lin.weight"], packed)


def test_two_codes_share_a_byte_the_first_in_its_high_bits():
    codes = torch.arange(32, dtype=torch.int8).remainder(16).view(1, 32)
    tensors = nf4_tensors("lin", codes, torch.ones(1, 1).bfloat16())
    assert bytes(tensors["lin.weight"].flatten().tolist()).hex() == "0123456789abcdef" * 2
    state = json.loads(bytes(tensors["lin.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state == {"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": [1, 32]}


def test_configuration_golden():
    assert nf4_config(["lm_head", "a.gate"]) == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": ["a.gate", "lm_head"],
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", CONFIGS)
def test_output_loaded_by_transformers_and_peft_computes_what_the_merged_export_does(tmp_path, family, dtype):
    run = commit_run(ObjectStore(str(tmp_path / "out")), tmp_path, CONFIGS[family](dtype=dtype), NF4)
    assemble(run.store, run.records, run.output, ["compressed", "dense"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base")
    packed = {name: m for name, m in base.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert packed.keys() == run.linears.keys()
    for name, linear in run.linears.items():
        read = dequantize_4bit(packed[name].weight.data, packed[name].weight.quant_state)
        assert torch.equal(read, make_grid("nf4", 4, 32).dequantize(linear.codes, linear.scale).bfloat16())

    model = PeftModel.from_pretrained(base, tmp_path / "out/adapter").eval()
    adapted = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {name for name, linear in run.linears.items() if linear.L.shape[1]}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/dense", dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        found, expected = model(ids).logits.float(), merged(ids).logits
        with model.disable_adapter():
            without = model(ids).logits.float()
    assert (found - expected).norm() < 0.01 * expected.norm()  # bitsandbytes computes in bfloat16
    assert (without - expected).norm() > 0.03 * expected.norm()


def test_blocks_read_one_by_one_are_what_was_committed(finished):
    run, _ = finished
    model = QuantizedModel.open(run.store.url)
    for index in range(model.block_count):
        tensors, factors = model.block(index)
        assert tensors.keys() == {name for name in run.model.state_dict() if f".layers.{index}." in name}
        assert factors.keys() == {n for n, lin in run.linears.items() if f".layers.{index}." in n and lin.L.shape[1]}
        for name in (name for name in run.linears if f".layers.{index}." in name):
            linear = run.linears[name]
            product = values(linear.codes) * linear.scale.float().repeat_interleave(32, dim=1)
            assert torch.equal(tensors[f"{name}.weight"], product.bfloat16())


def test_manifest_and_configuration_state_table_and_bits(finished):
    run, manifest = finished
    assert manifest.layers[LINEAR] == {
        "k": 2, "rank": 5, "shape": [64, 64], "bits": 4, "group_size": 32, "codebook": "nf4",
    }  # fmt: skip
    assert manifest.unquantized == ["model.layers.1.mlp.up_proj"]
    skipped = run.store.get_json("base/config.json")["quantization_config"]["llm_int8_skip_modules"]
    assert skipped == ["lm_head", "model.embed_tokens", "model.layers.1.mlp.up_proj"]
    codes_only = [layer | {"rank": 0} for layer in manifest.layers.values()]
    tensors = [nf4_tensors("", linear.codes, linear.scale) for linear in run.linears.values()]
    stored = sum(each[".weight"].nbytes + each[".weight.absmax"].nbytes for each in tensors)
    weights = sum(linear.codes.numel() for linear in run.linears.values())
    assert bits_per_weight(codes_only) == 8 * stored / weights == 4 + 32 / 32


def test_names_tell_which_linears_are_packed():
    names = [*nf4_tensors("a.q", *random_linear(2, 32, 32)), "a.norm.weight", "a.k.weight_packed"]
    assert quantized_linears(names) == ["a.q", "a.k"]


def test_verify_sound_output_finds_nothing(finished):
    run, _ = finished
    assert verify_output(run.store.url) == []


def test_verify_block_scale_of_zero_is_found(finished):
    run, manifest = finished
    rewrite(run.store, SHARD, spoil(f"{LINEAR}.weight.absmax", 0))
    recommit(run.store, manifest)
    assert verify_output(run.store.url) == [
        f"{SHARD}: tensor {LINEAR}.weight.absmax: 1 of 128 scales are zero",
    ]


def drop(name):
    def change(tensors):
        del tensors[name]

    return change


@pytest.mark.parametrize(
    ("ending", "shape"), [("", "(2048, 1)"), (".absmax", "(128,)"), (".quant_map", "(16,)")], ids=str
)
def test_verify_missing_part_is_found(finished, ending, shape):
    run, manifest = finished
    rewrite(run.store, SHARD, drop(f"{LINEAR}.weight{ending}"))
    recommit(run.store, manifest)
    problems = verify_output(run.store.url)
    assert f"base/: tensor {LINEAR}.weight{ending}: shape None, by the manifest {shape}" in problems


def test_verify_table_that_the_configuration_or_the_manifest_does_not_know_is_found(finished):
    run, manifest = finished
    layers = {name: {k: v for k, v in layer.items() if k != "codebook"} for name, layer in manifest.layers.items()}
    recommit(run.store, manifest, layers=layers)
    problems = verify_output(run.store.url)
    assert any(problem.startswith("base/config.json: codebook nf4, by the manifest layer") for problem in problems)
    assert f"base/: tensor {LINEAR}.weight.absmax: shape (128,), by the manifest None" in problems
