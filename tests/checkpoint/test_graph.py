"""The graph names every linear layer of every family and finds which of them share an input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from srr_dist.checkpoint.graph import build_graph
from srr_dist.checkpoint.source import open_checkpoint
from srr_dist.errors import CheckpointError
from tests.families import FAMILIES, build

SEPARATE = {"q": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "o": "self_attn.o_proj"}
GATED = {"up": "mlp.gate_proj mlp.up_proj", "down": "mlp.down_proj"}
FUSED = {"q": "self_attn.qkv_proj", "o": "self_attn.o_proj", "up": "mlp.gate_up_proj", "down": "mlp.down_proj"}
OPT = {"q": "self_attn.q_proj self_attn.k_proj self_attn.v_proj", "o": "self_attn.out_proj", "up": "fc1", "down": "fc2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_of_each_family_groups_linears_by_shared_input(tmp_path: Path, family: str) -> None:
    graph = build_graph(open_checkpoint(str(build(family, tmp_path))))
    expected = {"phi3": FUSED, "opt": OPT}.get(family, SEPARATE | GATED)
    for block in graph.blocks:
        groups: dict[str, list[str]] = {}
        for linear in block.linears:
            groups.setdefault(linear.input, []).append(linear.name.removeprefix(f"{block.name}."))
        assert [" ".join(names) for names in groups.values()] == list(expected.values())
        assert all(group == f"{block.name}.{names[0]}" for group, names in groups.items())


def test_graph_divides_all_tensors_between_blocks_and_rest(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    graph = build_graph(checkpoint)
    assert [(block.index, block.name) for block in graph.blocks] == [(i, f"model.layers.{i}") for i in range(4)]
    assert graph.rest == ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    divided = [name for block in graph.blocks for name in block.tensors] + list(graph.rest)
    assert sorted(divided) == sorted(checkpoint.tensors)
    read = checkpoint.read(graph.blocks[1].tensors)
    assert graph.blocks[1].nbytes == sum(tensor.nbytes for tensor in read.values())


def test_graph_gives_each_linear_the_extents_of_its_weight(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    for linear in build_graph(checkpoint).blocks[0].linears:
        assert checkpoint.tensors[f"{linear.name}.weight"].shape == (linear.out_features, linear.in_features)


def test_tied_head_is_not_in_the_rest(tmp_path: Path) -> None:
    graph = build_graph(open_checkpoint(str(build("llama-tied", tmp_path))))
    assert graph.rest == ("model.embed_tokens.weight", "model.norm.weight")


class _InPlaceMLP(LlamaMLP):
    """Changes its input in place between two linear layers: the same memory, but other values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(x)
        x.mul_(2)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


def test_input_changed_in_place_is_not_shared(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP", _InPlaceMLP)
    block = build_graph(open_checkpoint(str(llama))).blocks[0]
    up_proj = next(linear for linear in block.linears if linear.name.endswith("up_proj"))
    assert up_proj.input == up_proj.name


class _IdleMLP(LlamaMLP):
    """Has a linear layer that its forward pass does not use."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)))


def test_linear_that_the_block_does_not_reach_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP", _IdleMLP)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj is not reached by its forward pass"):
        build_graph(open_checkpoint(str(llama)))


def test_block_that_is_passed_something_of_the_tokens_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    rotary = modeling_llama.LlamaRotaryEmbedding.forward

    def leaking(self: nn.Module, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rotary(self, x, position_ids)
        return cos + x.mean(), sin

    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", leaking)
    with pytest.raises(CheckpointError, match=r"block model\.layers\.0: is passed more that depends on the tokens"):
        build_graph(open_checkpoint(str(llama)))
