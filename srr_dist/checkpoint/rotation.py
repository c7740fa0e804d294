"""A checkpoint whose weights are rotated so that no entry stands out, and that computes what it computed before.

For orthogonal R, ``x Wᵀ = (x R) (W R)ᵀ``. Incoherence processing (QuIP, arXiv 2307.13304) multiplies weights by random
rotations on both sides before they are quantized; whatever has to be undone while the model runs costs its readers. Two
rotations cost nothing, since they go from one weight into the next (QuaRot, arXiv 2404.00456):

- of the residual stream, which RMS norms let pass: ``E R`` for the embedding, ``W diag(γ) R`` for what reads the stream
  behind a norm of weights γ, which become ones, the head among it, and ``Rᵀ W`` for what writes to it;
- of the values of each head, which attention adds up: ``Sᵀ W_v`` and ``W_o S``, head by head.

Queries and keys pass rotary embeddings, and gates a non-linearity, so that outputs of these layers stay as they are,
and so do the inputs of ``down_proj``. R is ``diag(s) (C ⊗ H)`` with random signs s, a Hadamard matrix H of the largest
power of two that divides the width, and the discrete cosine transform C of what is left.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from srr_dist.checkpoint.skeleton import build_skeleton, decoder_blocks
from srr_dist.checkpoint.source import Checkpoint
from srr_dist.errors import CheckpointError
from srr_dist.seeds import layer_seed
from srr_dist.threads import one_thread

CONFIG_KEY = "srr_rotation"
"""In config.json: the seed of the rotations that the weights beside it have."""

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_ATTENTION, _MLP = "input_layernorm.weight", "post_attention_layernorm.weight"
_READERS = {
    **{f"self_attn.{name}.weight": _ATTENTION for name in ("q_proj", "k_proj", "v_proj", "qkv_proj")},
    **{f"mlp.{name}.weight": _MLP for name in ("gate_proj", "up_proj", "gate_up_proj")},
}
"""What reads the residual stream, and the norm it reads it behind."""
_WRITERS = {f"{name}.{kind}" for name in ("self_attn.o_proj", "mlp.down_proj") for kind in ("weight", "bias")}
_VALUES = {"self_attn.v_proj.weight", "self_attn.v_proj.bias"}
_AS_THEY_ARE = {
    *(f"self_attn.{name}.bias" for name in ("q_proj", "k_proj", "qkv_proj")),
    *(f"self_attn.{name}.weight" for name in ("q_norm", "k_norm")),
    *(f"mlp.{name}.bias" for name in ("gate_proj", "up_proj", "gate_up_proj")),
}
_KNOWN = {*_READERS, *_READERS.values(), *_WRITERS, *_VALUES, *_AS_THEY_ARE}

_STRIP = 2**22
"""Entries that are rotated at once, in float32 or wider."""


@dataclass(frozen=True)
class Rotation:
    """``R = diag(s) (C ⊗ H)`` of a width, with signs from a seed."""

    width: int
    seed: int

    def apply(self, X: Tensor, weights: Tensor | None = None) -> Tensor:
        """``X R``, or ``X diag(weights) R``, for ``X: [..., width]``; in its type, rounded once."""
        wide = torch.promote_types(X.dtype, torch.float32)
        scale = torch.randint(0, 2, (self.width,), generator=torch.Generator().manual_seed(self.seed)) * 2.0 - 1.0
        scale = scale.to(wide) if weights is None else weights.to(wide) * scale.to(wide)
        rows = X.reshape(-1, self.width)
        found = torch.empty_like(rows, memory_format=torch.contiguous_format)
        count = max(1, _STRIP // self.width)
        for part, out in zip(rows.split(count), found.split(count), strict=True):
            out.copy_(self._mixed(part.to(wide) * scale))
        return found.reshape(X.shape)

    def _mixed(self, X: Tensor) -> Tensor:
        """``X (C ⊗ H)`` of ``X: [rows, width]``."""
        power, step = self.width & -self.width, 1
        while step < power:
            first, second = X.reshape(len(X), -1, 2, step).unbind(2)
            X = torch.stack((first + second, first - second), dim=2)
            step *= 2
        parts, C = X.reshape(len(X), -1, power), _cosines(self.width // power).to(X.dtype)
        with one_thread():  # sums of few terms, in the same order on any number of cores
            return (C.mT @ parts).reshape(len(X), -1) / math.sqrt(power)


@cache
def _cosines(size: int) -> Tensor:
    """The orthonormal discrete cosine transform (DCT-II), float64 ``[size, size]``."""
    rows = [[math.cos(math.pi * k * (2 * i + 1) / (2 * size)) for k in range(size)] for i in range(size)]
    scale = [math.sqrt((1 if k == 0 else 2) / size) for k in range(size)]
    return torch.tensor(rows, dtype=torch.float64) * torch.tensor(scale, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class RotatedCheckpoint(Checkpoint):
    """A checkpoint that is read rotated.

    Attributes:
        source: as it was.
        blocks: names of the decoder blocks.
        head_dim: width of a head's values.
        seed: of the rotations.
    """

    source: Checkpoint
    blocks: tuple[str, ...]
    head_dim: int
    seed: int

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, as they are once both rotations are folded in; raises as ``Checkpoint.read``."""
        wanted, tensors = list(names), dict[str, Tensor]()
        found = self.source.read(self._sources(wanted))
        for name in wanted:
            tensors[name] = self._folded(name, found)
            if name in found and found[name].dim() > 1 and name != self._head:  # others may be made from it
                del found[name]
        return tensors

    def check(self, names: Iterable[str]) -> None:
        """As ``Checkpoint.check``, of what the named tensors are made from; nothing is rotated for it."""
        self.source.check(self._sources(names))

    def _sources(self, names: Iterable[str]) -> list[str]:
        return sorted({source for name in names for source in self._made_from(name)})

    def _made_from(self, name: str) -> list[str]:
        """Names of what a tensor is made from in the source."""
        block, leaf = _place(name, self.blocks)
        if name == _HEAD:
            return [self._head, _NORM]
        return [name, f"{block}.{_READERS[leaf]}"] if leaf in _READERS else [name]

    def _folded(self, name: str, found: Mapping[str, Tensor]) -> Tensor:
        block, leaf = _place(name, self.blocks)
        if name == _HEAD:
            return self._stream.apply(found[self._head], found[_NORM])
        W = found[name]
        if name == _EMBEDDING:
            return self._stream.apply(W)
        if name == _NORM or leaf in _READERS.values():
            return torch.ones_like(W)
        if leaf in _READERS:
            W = self._stream.apply(W, found[f"{block}.{_READERS[leaf]}"])
        if leaf in _VALUES:
            heads = W.reshape(-1, self.head_dim, *W.shape[1:]).movedim(1, -1)
            W = self._heads(block).apply(heads).movedim(-1, 1).reshape(W.shape)
        if leaf == "self_attn.o_proj.weight" and f"{block}.self_attn.v_proj.weight" in self.tensors:
            W = self._heads(block).apply(W.reshape(len(W), -1, self.head_dim)).reshape(W.shape)
        if leaf in _WRITERS:
            W = self._stream.apply(W.mT).mT.contiguous() if W.dim() == 2 else self._stream.apply(W)
        return W

    @property
    def _head(self) -> str:
        return _HEAD if _HEAD in self.source.tensors else _EMBEDDING

    @property
    def _stream(self) -> Rotation:
        return Rotation(self.tensors[_EMBEDDING].shape[1], layer_seed(self.seed, "residual stream"))

    def _heads(self, block: str) -> Rotation:
        return Rotation(self.head_dim, layer_seed(self.seed, f"{block} values"))


def rotated(checkpoint: Checkpoint, seed: int) -> RotatedCheckpoint:
    """The same model, rotated; a head that was the embedding becomes a tensor of its own.

    Raises:
        CheckpointError: rotations cannot be folded into this architecture; says which part of it stands in the way.
    """
    config = checkpoint.config
    skeleton = build_skeleton(config, torch.float32)
    blocks = decoder_blocks(skeleton)
    if config.get_text_config() is not config:
        raise _refusal(checkpoint, "its configuration is that of a multimodal parent")
    expected = {_EMBEDDING, _NORM, _HEAD}
    places = {name: _place(name, blocks) for name in checkpoint.tensors}
    outside = {name for name, (block, _) in places.items() if not block}
    inside = {name: leaf for name, (block, leaf) in places.items() if block}
    if strange := sorted((outside - expected) | {name for name, leaf in inside.items() if leaf not in _KNOWN}):
        raise _refusal(checkpoint, f"it has {strange[0]}, which they are not known to pass")
    if missing := sorted(({_EMBEDDING, _NORM} - outside) | ({_ATTENTION, _MLP} - set(inside.values()))):
        raise _refusal(checkpoint, f"it lacks {missing[0]}")
    first = next(iter(blocks))
    for norm in (_NORM, f"{first}.{_ATTENTION}", f"{first}.{_MLP}"):
        if not _is_rms_norm(skeleton.get_submodule(norm.removesuffix(".weight"))):
            raise _refusal(checkpoint, f"{norm.removesuffix('.weight')} is no RMS norm times its weights")
    described = json.loads(checkpoint.config_json) | {"tie_word_embeddings": False, CONFIG_KEY: seed}
    head = checkpoint.tensors.get(_HEAD) or replace(checkpoint.tensors[_EMBEDDING], name=_HEAD)
    same: dict[str, Any] = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    return RotatedCheckpoint(
        **same
        | {
            "tensors": dict(checkpoint.tensors) | {_HEAD: head},
            "config_json": json.dumps(described, indent=2),
            "identity": hashlib.sha256(f"{checkpoint.identity}\0rotated\0{seed}".encode()).hexdigest(),
        },
        source=checkpoint,
        blocks=tuple(blocks),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        seed=seed,
    )


def as_in(checkpoint: Checkpoint, config_json: str) -> Checkpoint:
    """A checkpoint, rotated as what was made from it and says so in its config.json (text)."""
    seed = json.loads(config_json).get(CONFIG_KEY)
    return checkpoint if seed is None else rotated(checkpoint, seed)


def _place(name: str, blocks: Iterable[str]) -> tuple[str, str]:
    """The block that a tensor is in, and its name there; "" outside the blocks."""
    for block in blocks:
        if name.startswith(f"{block}."):
            return block, name.removeprefix(f"{block}.")
    return "", ""


def _is_rms_norm(norm: nn.Module) -> bool:
    """Whether a module divides by the root mean square and multiplies by its weights, and does no more."""
    module: Any = deepcopy(norm).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    width = module.weight.shape[0]
    x, weight = (torch.randn(shape, generator=generator) for shape in ((3, width), (width,)))
    module.weight.data = weight
    x = 100.0 * x + 50.0  # far above any epsilon, and with a mean that a layer norm would take away
    expected = x * x.square().mean(-1, keepdim=True).rsqrt() * weight
    return torch.allclose(module(x), expected, rtol=1e-3, atol=1e-4)


def _refusal(checkpoint: Checkpoint, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.model}: rotations cannot be folded into its weights: {reason}; leave --incoherence out"
    )
