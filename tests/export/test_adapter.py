"""The adapter's names and configuration; that PEFT applies it with scale 1 is tested with whole models."""

import pytest
import torch

from srr_dist.export.adapter import adapter_config, adapter_ranks, adapter_tensors, legal_vllm_rank


def test_adapter_tensors_carry_peft_names():
    L, R = torch.ones(6, 2, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16)
    stored = adapter_tensors("model.layers.0.mlp.up_proj", L, R)
    assert list(stored) == [
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight",
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
    ]
    assert [t is source for t, source in zip(stored.values(), (L, R), strict=True)] == [True, True]


def test_adapter_tensors_rank_zero_stores_nothing():
    assert adapter_tensors("a", torch.zeros(6, 0), torch.zeros(0, 4)) == {}


def test_adapter_ranks_are_read_from_the_stored_shapes():
    stored = adapter_tensors("a.q", torch.zeros(6, 2), torch.zeros(2, 4))
    assert adapter_ranks({name: tuple(t.shape) for name, t in stored.items()}) == {"a.q": 2}


def test_adapter_config_equal_ranks_needs_no_patterns():
    config = adapter_config({"a.q": 8, "a.k": 8})
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
    assert config["target_modules"] == ["a.k", "a.q"]


def test_adapter_config_smaller_ranks_are_listed_with_equal_alpha():
    config = adapter_config({"m.layers.1.q": 8, "m.layers.11.q": 3})
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {r"m\.layers\.11\.q": 3}


@pytest.mark.parametrize(("rank", "legal"), [(1, 1), (2, 8), (32, 32), (33, 64), (300, 320), (512, 512), (513, None)])
def test_legal_vllm_rank_is_the_next_accepted_value(rank, legal):
    assert legal_vllm_rank(rank) == legal
