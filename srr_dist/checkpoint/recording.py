"""What a model passes to its decoder blocks, taken from a pass in which the blocks do nothing.

Masks and rotary embeddings depend on the architecture and, in hybrids, on the layer; they do not depend on the hidden
states. So one pass with every block's forward replaced records the arguments with which each block can be called alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map_only
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Call:
    """What one block is called with beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """``block`` applied to ``hidden_states`` [B, T, d] with the recorded arguments."""
        output = block(hidden_states, *self.args, **self.kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def to(self, device: torch.device) -> Call:
        """The same call with its tensors on ``device``."""
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (self.args, self.kwargs))
        return Call(args, kwargs)

    def equals(self, other: Call) -> bool:
        """Whether both calls pass the same values."""
        mine, theirs = tree_flatten((self.args, self.kwargs)), tree_flatten((other.args, other.kwargs))
        return mine[1] == theirs[1] and all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b or a == b
            for a, b in zip(mine[0], theirs[0], strict=True)
        )


class _AllRecorded(BaseException):
    """Ends a recorded pass before the head is computed; not an Exception, so that no model code swallows it."""


@torch.no_grad()
def record_calls(
    model: PreTrainedModel, blocks: Sequence[nn.Module], input_ids: torch.Tensor
) -> tuple[torch.Tensor, tuple[Call, ...]]:
    """Run ``model`` on ``input_ids`` [B, T] with blocks that return their input, up to the last one.

    Returns:
        The hidden states [B, T, d] that enter the first block, and each block's call.
    """
    calls: list[Call] = []
    embedded = torch.empty(0)

    def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal embedded
        embedded = hidden_states
        calls.append(Call(args, kwargs))
        if len(calls) == len(blocks):
            raise _AllRecorded
        return hidden_states

    # Tensors made in inference mode could not be used by a later pass with autograd.
    with torch.inference_mode(mode=False), forwards_replaced(blocks, record), suppress(_AllRecorded):
        model(input_ids=input_ids, use_cache=False)
    return embedded, tuple(calls)


@contextmanager
def forwards_replaced(modules: Sequence[nn.Module], forward: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within the context, every module's forward is ``forward``; hooks still run."""
    for module in modules:
        module.__dict__["forward"] = forward  # an instance attribute hides the class's method
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]
