"""A model run block by block gives the bits of the whole model, and holds only what was asked for."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.source import open_checkpoint
from srr_dist.errors import CheckpointError
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


@pytest.fixture(scope="module")
def llama_ids() -> torch.Tensor:
    return token_ids(2, 10)


def real_bytes(module: torch.nn.Module) -> int:
    """Bytes of the distinct storages of a module's parameters that are not on the meta device."""
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters() if not p.is_meta
    }
    return sum(storages.values())


def test_sharded_checkpoint_streams_to_the_same_bits(llama: Path, sharded: Path, llama_ids: torch.Tensor) -> None:
    outputs, logits = streamed(Decoder(open_checkpoint(str(sharded)), dtype=torch.float32), 4, llama_ids)
    expected_outputs, expected_logits = whole_model(llama, llama_ids, torch.float32)
    assert all(map(torch.equal, outputs, expected_outputs))
    assert torch.equal(logits, expected_logits)


def test_new_decoder_holds_no_weight_memory(llama: Path) -> None:
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.float32)
    assert all(parameter.is_meta for block in decoder._empty_blocks.values() for parameter in block.parameters())
    assert real_bytes(decoder._model) == 3 * 4  # one element each for embedding, norm and head


def test_new_decoder_multiplies_with_no_hollow_head(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    linear = torch.nn.Linear.forward
    monkeypatch.setattr(
        torch.nn.Linear, "forward", lambda self, x: (shapes.append(self.weight.shape), linear(self, x))[1]
    )
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.float32)
    assert shapes == []  # the product would first expand the zeros to the head's full size
    decoder.load_head()
    decoder.logits(torch.zeros(1, 2, 64))
    assert shapes == [(VOCAB_SIZE, 64)]


def test_only_loaded_blocks_occupy_memory_and_dropping_frees_them(llama: Path, llama_ids: torch.Tensor) -> None:
    checkpoint = open_checkpoint(str(llama))
    decoder = Decoder(checkpoint, dtype=torch.float32)
    h = torch.randn(2, 10, 64)
    block = weakref.ref(decoder.load_block(2))
    expected = sum(e.nbytes for name, e in checkpoint.tensors.items() if name.startswith("model.layers.2."))
    assert real_bytes(decoder.block(2)) == expected
    decoder.run_block(2, h)
    assert real_bytes(decoder._model) == 3 * 4
    decoder.drop_block(2)
    gc.collect()
    assert block() is None


def test_dropped_block_loads_again_with_its_original_children(llama: Path) -> None:
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.float32)
    h = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0))
    decoder.load_block(0)
    expected = decoder.run_block(0, h)
    decoder.block(0).mlp.up_proj = torch.nn.Linear(64, 128, bias=False)
    assert not torch.equal(decoder.run_block(0, h), expected)
    decoder.drop_block(0)
    decoder.load_block(0)
    assert torch.equal(decoder.run_block(0, h), expected)


def test_tied_head_shares_the_memory_of_the_embedding(tmp_path: Path) -> None:
    decoder = Decoder(open_checkpoint(str(build("llama-tied", tmp_path))), dtype=torch.bfloat16)
    decoder.load_head()
    decoder.load_embedding()
    assert real_bytes(decoder._model) == (VOCAB_SIZE * 64 + 64) * 2
    decoder.drop_rest()
    assert real_bytes(decoder._model) <= 3 * 2


def test_load_block_casts_weights_and_leaves_rotary_frequencies_in_float32(llama: Path) -> None:
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in decoder.load_block(0).parameters()} == {torch.bfloat16}
    assert {buffer.dtype for name, buffer in decoder._model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_load_block_takes_given_tensors_instead_of_the_files(llama: Path) -> None:
    checkpoint = open_checkpoint(str(llama))
    decoder = Decoder(checkpoint, dtype=torch.float32)
    names = [name for name in checkpoint.tensors if name.startswith("model.layers.1.")]
    doubled = {name: 2 * tensor for name, tensor in checkpoint.read(names).items()}
    decoder.load_block(1, doubled)
    up_proj = decoder.linear_modules(1)["model.layers.1.mlp.up_proj"]
    assert torch.equal(up_proj.weight, doubled["model.layers.1.mlp.up_proj.weight"])


def test_load_block_with_a_tensor_missing_is_refused(llama: Path) -> None:
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.float32)
    with pytest.raises(
        CheckpointError, match=r"block model\.layers\.0: tensor model\.layers\.0\.\S+ is not among the 0"
    ):
        decoder.load_block(0, {})


def test_run_block_differentiates_through_input_and_weights(llama: Path) -> None:
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.float32)
    decoder.load_block(0)
    weight = decoder.linear_modules(0)["model.layers.0.self_attn.q_proj"].weight.requires_grad_()
    h = torch.randn(1, 6, 64, requires_grad=True)
    decoder.run_block(0, h).square().sum().backward()
    assert h.grad is not None and bool(h.grad.any())
    assert weight.grad is not None and bool(weight.grad.any())


def test_calls_recorded_in_inference_mode_serve_a_later_backward_pass(llama: Path) -> None:
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.float32)
    decoder.load_block(0)
    with torch.inference_mode():
        decoder.run_block(0, torch.randn(1, 6, 64))
    h = torch.randn(1, 6, 64, requires_grad=True)
    decoder.run_block(0, h).sum().backward()
    assert h.grad is not None and bool(h.grad.any())


def test_run_block_follows_a_change_of_batch_and_length(llama: Path) -> None:
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.float32)
    decoder.load_block(0)
    h = torch.randn(3, 12, 64)
    with torch.no_grad():
        whole = decoder.run_block(0, h)
        assert torch.allclose(decoder.run_block(0, h[:1, :7]), whole[:1, :7], atol=1e-5)
        assert torch.equal(decoder.run_block(0, h), whole)


def test_linear_modules_are_named_in_full(llama: Path) -> None:
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.float32)
    decoder.load_block(3)
    assert list(decoder.linear_modules(3)) == [
        *(f"model.layers.3.self_attn.{name}_proj" for name in "qkvo"),
        *(f"model.layers.3.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]


def test_what_is_not_loaded_cannot_be_used_by_mistake(llama: Path, llama_ids: torch.Tensor) -> None:
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.float32)
    with pytest.raises(LookupError, match=r"model\.embed_tokens\.weight is not loaded; call load_embedding\(\)"):
        decoder.embed(llama_ids)
    with pytest.raises(LookupError, match=r"call load_head\(\) first"):
        decoder.logits(torch.zeros(1, 2, 64))
    with pytest.raises(LookupError, match=r"block model\.layers\.1 is not loaded; call load_block\(1\) first"):
        decoder.run_block(1, torch.zeros(1, 2, 64))
