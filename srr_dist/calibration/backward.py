"""A block's backward pass, alone: from the gradient at its output to that at its input, past each linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

Deliver = Callable[[str, Tensor, Tensor], None]
"""Takes a layer's name, its inputs ``X: [T, n]`` and the gradients at its outputs ``g: [T, m]``."""


class BlockPass:
    """One sequence's pass through a block, with what it takes to bring a gradient back.

    No gradient of a weight is formed, since parameters do not require any: what it would be, ``gᵀ X``, is left to
    whoever receives the two. Layers are delivered on the way back, one after the other, and let go.

    Args:
        run: the block, ``[1, T, d]`` to ``[1, T, d]``.
        linears: name -> linear layer of the block to be delivered.
        hidden: the block's input ``[1, T, d]``.
        deliver: is told of each layer.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], linears: Mapping[str, nn.Module], hidden: Tensor, deliver: Deliver
    ) -> None:
        self._leaf = hidden.detach().requires_grad_()
        handles = [module.register_forward_hook(partial(_listen, deliver, name)) for name, module in linears.items()]
        try:
            with torch.enable_grad():
                self._output = run(self._leaf)
        finally:
            for handle in handles:
                handle.remove()

    @property
    def output(self) -> Tensor:
        """What leaves the block, ``[1, T, d]``, without its history."""
        return self._output.detach()

    def back(self, slope: Tensor) -> Tensor:
        """The gradient at the block's input from that at its output, ``[1, T, d]`` both; can be taken once."""
        (found,) = torch.autograd.grad(self._output, self._leaf, slope)
        return found


def _listen(deliver: Deliver, name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    inputs = args[0].detach()
    output.register_hook(lambda slope: deliver(name, inputs.flatten(0, -2), slope.flatten(0, -2)))
