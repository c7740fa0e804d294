"""Hidden states on their way through Ray: torch tensors are copied there, numpy arrays are mapped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Payload = np.ndarray[Any, Any]
"""``[B, T, d]``; bfloat16, which numpy lacks, travels as uint16 of the same bits."""


def pack(sequences: Sequence[Tensor]) -> Payload:
    """Hidden states ``[1, T, d]`` of several sequences as one array."""
    joined = torch.cat([hidden.cpu() for hidden in sequences])
    return joined.view(torch.uint16).numpy() if joined.dtype == torch.bfloat16 else joined.numpy()


def unpack(payload: Payload, dtype: torch.dtype) -> list[Tensor]:
    """The sequences of a payload, ``[1, T, d]`` each, in memory of their own: Ray's is read-only."""
    return [torch.from_numpy(row.copy()).view(dtype).unsqueeze(0) for row in payload]
