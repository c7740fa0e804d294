"""The model with only the weights asked for.

Blocks that are not loaded lie on the meta device. Weights outside the blocks that are not loaded are single zeros seen
through stride 0, so that the model can run around its blocks, for masks and rotary embeddings, without their memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from srr_dist.checkpoint.recording import Call, forwards_replaced, record_calls
from srr_dist.checkpoint.skeleton import (
    build_skeleton,
    decoder_blocks,
    hollow_out,
    names_outside,
    set_tensor,
    tied_sources,
)
from srr_dist.checkpoint.source import Checkpoint
from srr_dist.errors import CheckpointError

_PROBE_TOKENS = (1, 2)  # [B, T] of the pass that finds out which modules surround the blocks


class Decoder:
    """A causal language model run block by block; hidden states are [B, T, d] in ``dtype`` on ``device``.

    ``run_block`` and ``logits`` follow the caller's gradient mode. Parameters do not require gradients; the caller may
    change that on a loaded block.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self._checkpoint = checkpoint
        self._model = build_skeleton(checkpoint.config, dtype)
        self._tied = tied_sources(self._model)
        self._empty_blocks = decoder_blocks(self._model)
        self._block_names = tuple(self._empty_blocks)
        self._loaded_blocks: dict[int, nn.Module] = {}
        self._loaded_rest: dict[str, str] = {}  # state-dict name -> stored name
        self._recorded: tuple[torch.Size, tuple[Call, ...]] | None = None
        for module in self._model.modules():
            module._buffers.update({n: b.to(self.device) for n, b in module._buffers.items() if b is not None})
        self._rest = names_outside(self._model.state_dict(), self._block_names)
        self.drop_rest()
        self._embedding, self._head = self._observe_surroundings()

    def load_block(self, index: int, tensors: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
        """Fill block ``index`` and return it; its children may be replaced until ``drop_block``.

        Args:
            index: of the block.
            tensors: state-dict name -> value for every tensor of the block (others are ignored); read from the
                checkpoint when None. Floating parameters are cast to ``dtype``, buffers keep theirs.

        Raises:
            CheckpointError: ``tensors`` lacks one, or the checkpoint cannot be read.
        """
        name = self._block_names[index]
        block = deepcopy(self._empty_blocks[name])
        state = {f"{name}.{leaf}": leaf for leaf in block.state_dict()}
        if tensors is None:
            tensors = self._checkpoint.read(state)
        for full_name, leaf in state.items():
            if full_name not in tensors:
                raise CheckpointError(f"block {name}: tensor {full_name} is not among the {len(tensors)} given")
            set_tensor(block, leaf, tensors[full_name], self.device)
        self._loaded_blocks[index] = block
        return block

    def block(self, index: int) -> nn.Module:
        """The loaded block ``index``."""
        if index not in self._loaded_blocks:
            raise LookupError(f"block {self._block_names[index]} is not loaded; call load_block({index}) first")
        return self._loaded_blocks[index]

    def linear_modules(self, index: int) -> dict[str, nn.Linear]:
        """Full module name -> linear layer of the loaded block ``index``."""
        prefix = self._block_names[index]
        modules = self.block(index).named_modules()
        return {f"{prefix}.{name}": module for name, module in modules if isinstance(module, nn.Linear)}

    def drop_block(self, index: int) -> None:
        """Free block ``index``; nothing happens if it is not loaded."""
        self._loaded_blocks.pop(index, None)

    def load_embedding(self) -> None:
        """Load what runs before the first block: token and position embeddings, projections, norms."""
        self._load_rest(self._embedding)

    def load_head(self) -> None:
        """Load what runs after the last block: final norm, projections and the head, which may be the embedding."""
        self._load_rest(self._head)

    def drop_rest(self) -> None:
        """Free everything outside the blocks."""
        self._loaded_rest.clear()
        hollow_out(self._model, self._rest, self.device)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The hidden states [B, T, d] that enter the first block for ``input_ids`` [B, T] int64."""
        self._require_loaded(self._embedding, "load_embedding")
        hidden_states, calls = record_calls(self._model, self._block_list(), input_ids.to(self.device))
        self._recorded = (input_ids.shape, calls)
        return hidden_states

    def run_block(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Block ``index`` applied to ``hidden_states`` [B, T, d] of B sequences without padding, no cache."""
        return self._calls(hidden_states.shape[:2])[index].run(self.block(index), hidden_states)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The logits [B, T, V] for the last block's output [B, T, d]."""
        self._require_loaded(self._head, "load_head")
        with forwards_replaced(self._block_list(), lambda *_, **__: hidden_states):
            output = self._model(input_ids=self._dummy_ids(hidden_states.shape[:2]), use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    def _calls(self, shape: torch.Size) -> tuple[Call, ...]:
        """Each block's call for [B, T] = ``shape``; the last shape's are kept."""
        if self._recorded is None or self._recorded[0] != shape:
            _, calls = record_calls(self._model, self._block_list(), self._dummy_ids(shape))
            self._recorded = (shape, calls)
        return self._recorded[1]

    def _dummy_ids(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device=self.device)

    def _block_list(self) -> list[nn.Module]:
        return list(self._empty_blocks.values())

    def _load_rest(self, names: Iterable[str]) -> None:
        new = {name: self._source(name) for name in names if name not in self._loaded_rest}
        holders = {source: name for name, source in self._loaded_rest.items()}
        tensors = self._checkpoint.read(sorted(set(new.values()) - holders.keys()))
        for name, source in new.items():  # a tied head shares the memory of a loaded embedding, and vice versa
            value = self._model.get_parameter(holders[source]) if source in holders else tensors[source]
            set_tensor(self._model, name, value, self.device)
        self._loaded_rest |= new

    def _source(self, name: str) -> str:
        """The stored name of a tensor outside the blocks."""
        return name if name in self._checkpoint.tensors else self._tied[name]

    def _require_loaded(self, names: Iterable[str], loader: str) -> None:
        for name in names:
            if name not in self._loaded_rest:
                raise LookupError(f"tensor {name} is not loaded; call {loader}() first")

    @torch.no_grad()
    def _observe_surroundings(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """State-dict names of the modules called before the first block, and of those called after the last.

        Raises:
            CheckpointError: neither the embedding nor the head is called as a module, so nothing tells what to load.
        """
        before: list[str] = []
        after: list[str] = []
        current = before

        def enter_blocks(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            nonlocal current
            current = after
            return hidden_states

        def note(name: str) -> Callable[..., None]:
            names = [full for full in self._rest if full.rpartition(".")[0] == name]
            return lambda *_: current.extend(names)

        untyped: Any = self._model
        output: nn.Module = untyped.get_output_embeddings()
        handles = [m.register_forward_pre_hook(note(name)) for name, m in self._model.named_modules()]
        try:
            # A product with a hollow matrix would first give it memory, and the head's is large.
            with forwards_replaced(self._block_list(), enter_blocks), forwards_replaced([output], lambda h: h):
                self._model(input_ids=self._dummy_ids(_PROBE_TOKENS), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        if not before or not after:
            raise CheckpointError(f"{type(self._model).__name__}: its embedding or head could not be found")
        return tuple(before), tuple(after)
