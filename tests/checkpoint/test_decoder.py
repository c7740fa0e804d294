"""A model run block by block gives the bits of the whole model, and holds only what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.source import open_checkpoint
from tests.families import FAMILIES, VOCAB_SIZE, build


def token_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def whole_model(folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each block's output and the logits of the model loaded by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    outputs: list[torch.Tensor] = []
    for block in model.get_decoder().layers:
        block.register_forward_hook(lambda _module, _args, out: outputs.append(out[0] if type(out) is tuple else out))
    logits = model(ids, use_cache=False).logits
    return outputs, logits


@torch.no_grad()
def streamed(decoder: Decoder, blocks: int, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same, with one block in memory at a time and nothing around the blocks while they run."""
    decoder.load_embedding()
    h = decoder.embed(ids)
    decoder.drop_rest()
    outputs = []
    for index in range(blocks):
        decoder.load_block(index)
        h = decoder.run_block(index, h)
        decoder.drop_block(index)
        outputs.append(h)
    decoder.load_head()
    return outputs, decoder.logits(h)


@pytest.mark.parametrize(
    ("family", "dtype"), [(family, torch.float32) for family in FAMILIES] + [("llama", torch.bfloat16)]
)
def test_streamed_blocks_of_each_family_equal_the_whole_model(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    folder = build(family, tmp_path)
    ids = token_ids(2, 24)  # three sliding windows long
    expected_outputs, expected_logits = whole_model(folder, ids, dtype)
    outputs, logits = streamed(Decoder(open_checkpoint(str(folder)), dtype=dtype), len(expected_outputs), ids)
    for index, (found, expected) in enumerate(zip(outputs, expected_outputs, strict=True)):
        assert torch.equal(found, expected), f"block {index}"
    assert torch.equal(logits, expected_logits)
