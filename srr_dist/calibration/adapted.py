"""Blocks that compute with Q + L·R, adapters unmerged: what is evaluated, and later trained."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class AdaptedLinear(nn.Module):
    """``y = x Qᵀ + b + (x Rᵀ) Lᵀ``: a linear layer and its adapter, unmerged, as PEFT runs them.

    Args:
        linear: holds Q ``[m, n]`` and the bias.
        L: ``[m, r]``, R: ``[r, n]``; cast to Q's type and device.
    """

    def __init__(self, linear: nn.Linear, L: Tensor, R: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.L, self.R = L.to(linear.weight), R.to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., n]`` to ``[..., m]``."""
        y: Tensor = self.linear(x) + (x @ self.R.mT) @ self.L.mT
        return y


def attach_adapters(
    block: nn.Module, linears: Mapping[str, nn.Linear], adapters: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Put every adapter ``name -> (L, R)`` beside its linear layer, in place.

    Args:
        block: the module that holds the layers.
        linears: full name -> layer of the block.
        adapters: full name -> factors; names that ``linears`` lacks are an error.
    """
    parents = {id(child): (module, name) for module in block.modules() for name, child in module.named_children()}
    for full_name, (L, R) in adapters.items():
        parent, name = parents[id(linears[full_name])]
        setattr(parent, name, AdaptedLinear(linears[full_name], L, R))
