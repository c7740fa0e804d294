"""The decoder blocks of a model, their linear layers, and which of these read the same input.

Nothing is told about architectures: each block runs once on the meta device with hooks on its linear layers, and two
layers share an input exactly when they are called with the same view of the same memory in the same version.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from srr_dist.checkpoint.recording import Call, record_calls
from srr_dist.checkpoint.skeleton import build_skeleton, decoder_blocks, hollow_out, names_outside
from srr_dist.checkpoint.source import Checkpoint
from srr_dist.errors import CheckpointError

_META = torch.device("meta")
_TOKENS = (1, 8)  # [B, T] of the observed pass; only the wiring is looked at


@dataclass(frozen=True)
class Linear:
    """One linear layer: weight [out_features, in_features]."""

    name: str
    """Full module name, ``model.layers.0.self_attn.q_proj``."""
    out_features: int
    in_features: int
    input: str
    """Name of the first linear layer of the block, in call order, that reads the same input."""


@dataclass(frozen=True)
class Block:
    """One decoder block."""

    index: int
    name: str
    """Full module name, ``model.layers.0``."""
    tensors: tuple[str, ...]
    """State-dict names of everything stored for it."""
    linears: tuple[Linear, ...]
    """In call order."""
    nbytes: int
    """Bytes of ``tensors`` in the source."""


@dataclass(frozen=True)
class BlockGraph:
    """The model as the quantizer sees it."""

    blocks: tuple[Block, ...]
    rest: tuple[str, ...]
    """State-dict names stored outside the blocks: embedding, final norm, head."""


def shared_inputs(block: Block, names: frozenset[str]) -> list[list[Linear]]:
    """The block's linear layers of these names, grouped by the input they read, in call order."""
    groups: dict[str, list[Linear]] = {}
    for linear in block.linears:
        if linear.name in names:
            groups.setdefault(linear.input, []).append(linear)
    return list(groups.values())


def build_graph(checkpoint: Checkpoint) -> BlockGraph:
    """The graph of ``checkpoint``; reads no weights.

    Raises:
        CheckpointError: a block has no linear layers, one that its forward pass does not reach, or inputs beside its
            hidden states that depend on the tokens, so that it cannot be run alone.
    """
    model = build_skeleton(checkpoint.config, torch.float32)
    modules = decoder_blocks(model)
    hidden_states, calls = _record(model, modules, fill=0.0)
    _, calls_of_other_states = _record(model, modules, fill=1.0)
    for name, call, other in zip(modules, calls, calls_of_other_states, strict=True):
        if not call.equals(other):
            raise CheckpointError(
                f"block {name}: is passed more that depends on the tokens than its hidden states; "
                "this architecture is not supported"
            )
    blocks = []
    for index, (name, module) in enumerate(modules.items()):
        tensors = tuple(tensor for tensor in checkpoint.tensors if tensor.startswith(f"{name}."))
        nbytes = sum(checkpoint.tensors[tensor].nbytes for tensor in tensors)
        linears = _observe_linears(name, module.to(_META), calls[index].to(_META), hidden_states.to(_META))
        blocks.append(Block(index, name, tensors, linears, nbytes))
    in_blocks = {tensor for block in blocks for tensor in block.tensors}
    return BlockGraph(tuple(blocks), tuple(name for name in checkpoint.tensors if name not in in_blocks))


def _record(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], fill: float
) -> tuple[torch.Tensor, tuple[Call, ...]]:
    hollow_out(model, names_outside(model.state_dict(), modules), torch.device("cpu"), fill)
    return record_calls(model, list(modules.values()), torch.zeros(_TOKENS, dtype=torch.int64))


def _observe_linears(block: str, module: nn.Module, call: Call, hidden_states: torch.Tensor) -> tuple[Linear, ...]:
    """The linear layers of one block in call order, with the first reader of each one's input."""
    names = {child: f"{block}.{name}" for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    linears: dict[str, Linear] = {}
    first_reader: dict[Hashable, str] = {}
    alive: list[torch.Tensor] = []  # a freed input's storage could come back as another input's

    def note(linear: nn.Module, args: tuple[torch.Tensor]) -> None:
        assert isinstance(linear, nn.Linear)
        alive.append(args[0])
        reader = first_reader.setdefault(_view(args[0]), names[linear])
        linears.setdefault(names[linear], Linear(names[linear], linear.out_features, linear.in_features, reader))

    handles = [linear.register_forward_pre_hook(note) for linear in names]
    try:
        with torch.no_grad():
            call.run(module, hidden_states)
    finally:
        for handle in handles:
            handle.remove()
    unreached = [name for name in names.values() if name not in linears]
    if unreached or not names:
        found = f"{unreached[0]} is not reached by its forward pass" if unreached else "it has no linear layers"
        raise CheckpointError(f"block {block}: {found}; this architecture is not supported")
    return tuple(linears.values())


def _view(tensor: torch.Tensor) -> Hashable:
    """Equal for two tensors exactly when they hold the same values by construction."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version
