"""The base folder's pieces: stored tensors, the value they load to, the configuration, shard names and index."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig

from srr_dist.export.base import (
    dense_tensors,
    dequantized,
    linear_tensors,
    quantization_config,
    shard_index,
    shard_name,
)

GROUPED = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
PER_CHANNEL = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}


def random_linear(bits: int, groups: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (8, 64), generator=generator, dtype=torch.int8)
    return codes, (torch.rand(8, groups, generator=generator) / 9 + 1e-3).to(torch.bfloat16)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", [1, 2])
def test_dequantized_equals_what_compressed_tensors_decompresses(bits, groups):
    codes, scale = random_linear(bits, groups)
    config = QuantizationConfig.model_validate(
        quantization_config({"lin": bits}, 64 // groups if groups > 1 else -1, [])
    )
    stored = {name.removeprefix("lin."): t for name, t in linear_tensors("lin", codes, scale, bits).items()}
    loaded = PackedQuantizationCompressor.decompress(stored, config.config_groups["group_0"])["weight"]
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(dequantized(codes, scale), loaded)
    assert torch.equal(dequantized(codes, scale, torch.float32), loaded.float())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("m", [8, 33])
def test_zero_points_are_stored_and_read_as_compressed_tensors_does(bits, groups, m):
    limit, generator = 1 << bits - 1, torch.Generator().manual_seed(bits)
    stored_codes = torch.randint(-limit, limit, (m, 64), generator=generator, dtype=torch.int8)
    zero = torch.randint(-limit, limit, (m, groups), generator=generator, dtype=torch.int16)
    scale = (torch.rand(m, groups, generator=generator) / 9 + 1e-3).bfloat16()
    codes = stored_codes - zero.repeat_interleave(64 // groups, dim=1)
    tensors = linear_tensors("lin", codes, scale, bits, zero)
    assert torch.equal(tensors["lin.weight_packed"], pack_to_int32(stored_codes, bits))
    assert torch.equal(tensors["lin.weight_zero_point"], pack_to_int32(zero.to(torch.int8), bits, packed_dim=0))
    settings = quantization_config({"lin": bits}, 64 // groups if groups > 1 else -1, [], symmetric=False)
    scheme = QuantizationConfig.model_validate(settings).config_groups["group_0"]
    local = {name.removeprefix("lin."): tensor for name, tensor in tensors.items()}
    assert set(local) == set(PackedQuantizationCompressor.compression_param_names(scheme))
    loaded = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
    assert torch.equal(dequantized(codes, scale), loaded)
    assert torch.equal(dense_tensors(tensors, {"lin": bits})["lin.weight"], loaded)


def test_zero_point_that_leaves_a_code_no_room_is_refused():
    codes, scale = torch.tensor([[4, 0]], dtype=torch.int16), torch.ones(1, 1).bfloat16()
    with pytest.raises(ValueError, match=r"codes of 3 bits must lie in -4\.\.3, found 0\.\.4"):
        linear_tensors("lin", codes, scale, 3, torch.zeros(1, 1, dtype=torch.int16))


def test_dequantized_power_of_two_scale_is_the_exact_product():
    codes = torch.tensor([[-3, 0, 1, 2]], dtype=torch.int8)
    scale = torch.tensor([[0.25, 2.0]], dtype=torch.bfloat16)
    assert dequantized(codes, scale, torch.float32).tolist() == [[-0.75, 0.0, 2.0, 4.0]]


def test_dequantized_general_scale_is_rounded_to_bfloat16_in_every_dtype():
    scale = torch.tensor([[1.0078125]], dtype=torch.bfloat16)  # 1 + 2^-7: three times it has nine significant bits
    assert dequantized(torch.tensor([[3]], dtype=torch.int8), scale, torch.float32).item() == 3.03125


def test_linear_tensors_carry_the_names_and_types_of_the_format():
    codes, scale = random_linear(3, 2)
    stored = linear_tensors("model.layers.0.mlp.up_proj", codes, scale, 3)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in stored.items()} == {
        "model.layers.0.mlp.up_proj.weight_packed": (torch.int32, (8, 6)),
        "model.layers.0.mlp.up_proj.weight_scale": (torch.bfloat16, (8, 2)),
        "model.layers.0.mlp.up_proj.weight_shape": (torch.int64, (2,)),
    }
    assert stored["model.layers.0.mlp.up_proj.weight_shape"].tolist() == [8, 64]


def test_dense_tensors_restore_names_and_keep_the_rest():
    codes, scale = random_linear(4, 2)
    norm = torch.ones(3)
    dense = dense_tensors({**linear_tensors("a.q", codes, scale, 4), "a.norm.weight": norm}, {"a.q": 4})
    assert list(dense) == ["a.q.weight", "a.norm.weight"]
    assert torch.equal(dense["a.q.weight"], dequantized(codes, scale))
    assert dense["a.norm.weight"] is norm


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "weights"), [(3, 32, GROUPED), (8, -1, PER_CHANNEL)])
def test_quantization_config_golden(bits, group_size, weights, symmetric):
    assert quantization_config({"lin": bits}, group_size, ["lm_head", "a.gate"], symmetric=symmetric) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["a.gate", "lm_head"],
        "dequantize": True,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights | {"symmetric": symmetric}}},
    }


def test_shard_name_golden():
    assert shard_name(7, 81) == "model-00007-of-00081.safetensors"


def test_shard_index_maps_every_tensor_and_sums_their_bytes():
    assert shard_index({"one": {"a": 8, "b": 2}, "two": {"c": 4}}) == {
        "metadata": {"total_size": 14},
        "weight_map": {"a": "one", "b": "one", "c": "two"},
    }
