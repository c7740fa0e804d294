"""Rotations folded into weights: the model computes what it did, no entry stands out, and what cannot be is refused."""

from dataclasses import replace

import pytest
import torch

from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.graph import build_graph
from srr_dist.checkpoint.rotation import CONFIG_KEY, Rotation, as_in, rotated
from srr_dist.checkpoint.source import open_checkpoint
from srr_dist.errors import CheckpointError
from tests.families import build, build_gguf
from tests.solve.problems import with_threads

FOLDED = ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3"]
IDS = torch.arange(24).reshape(1, 24) * 5 % 256


def logits(checkpoint, dtype=torch.float64):
    decoder, graph = Decoder(checkpoint, dtype=dtype), build_graph(checkpoint)
    decoder.load_embedding()
    hidden = decoder.embed(IDS)
    for block in graph.blocks:
        decoder.load_block(block.index)
        hidden = decoder.run_block(block.index, hidden)
        decoder.drop_block(block.index)
    decoder.load_head()
    return decoder.logits(hidden)[0]


def matrix(rotation):
    return rotation.apply(torch.eye(rotation.width, dtype=torch.float64))


@pytest.mark.parametrize("width", [1, 2, 12, 64, 96, 576])
def test_rotation_is_orthogonal_and_spreads_every_input_over_all(width):
    R = matrix(Rotation(width, 3))
    torch.testing.assert_close(R @ R.mT, torch.eye(width, dtype=torch.float64))
    assert R.abs().max() <= 2**0.5 / (width & -width) ** 0.5 + 1e-12


@pytest.mark.parametrize("width", [8, 12])
def test_rotation_is_the_product_that_it_is_written_as(width):
    power = width & -width
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < power:
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    i, k = torch.meshgrid(*[torch.arange(width // power, dtype=torch.float64)] * 2, indexing="ij")
    C = torch.cos(torch.pi * k * (2 * i + 1) / (2 * len(i))) * torch.where(k == 0, 1.0, 2.0).sqrt() / len(i) ** 0.5
    signs = torch.randint(0, 2, (width, 1), generator=torch.Generator().manual_seed(4)) * 2.0 - 1.0
    torch.testing.assert_close(matrix(Rotation(width, 4)), signs * torch.kron(C, H) / power**0.5)


def test_weights_go_before_the_rotation_and_the_result_has_the_type_of_what_came():
    rotation, generator = Rotation(24, 1), torch.Generator().manual_seed(0)
    X, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 24), (24,)))
    torch.testing.assert_close(rotation.apply(X, weights), X * weights @ matrix(rotation))
    found = rotation.apply(X.bfloat16(), weights.bfloat16())
    assert found.dtype == torch.bfloat16
    exact = X.bfloat16().double() * weights.bfloat16().double() @ matrix(rotation)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


def test_rotation_depends_on_its_seed_and_not_on_threads_or_strips(monkeypatch):
    X = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    first = with_threads(1, lambda: Rotation(96, 1).apply(X))
    assert torch.equal(first, with_threads(2, lambda: Rotation(96, 1).apply(X)))
    assert not torch.equal(first, Rotation(96, 2).apply(X))
    monkeypatch.setattr("srr_dist.checkpoint.rotation._STRIP", 96 * 7)
    torch.testing.assert_close(Rotation(96, 1).apply(X), first)


@pytest.mark.parametrize("family", FOLDED)
def test_rotated_model_computes_what_it_did(family, tmp_path):
    source = open_checkpoint(str(build(family, tmp_path, dtype=torch.float64)))
    turned = rotated(source, 5)
    torch.testing.assert_close(logits(turned), logits(source), rtol=1e-4, atol=1e-5)  # norms are float32
    graph = build_graph(turned)
    for block in graph.blocks[:1]:
        weights, before = turned.read(block.tensors), source.read(block.tensors)
        assert weights.keys() == before.keys()
        changed = {
            name for name in weights if weights[name].dim() == 2 and not torch.equal(weights[name], before[name])
        }
        assert changed == {f"{linear.name}.weight" for linear in block.linears}
        assert all(weights[name].dtype == before[name].dtype for name in weights)


def test_rotated_gguf_model_computes_what_it_did(tmp_path):
    source = open_checkpoint(str(build_gguf(tmp_path / "tiny.gguf")))
    torch.testing.assert_close(logits(rotated(source, 1)), logits(source), rtol=1e-4, atol=1e-4)


def test_a_weight_that_stands_out_is_spread(tmp_path):
    source = open_checkpoint(str(build("llama", tmp_path)))
    name = "model.layers.1.mlp.up_proj.weight"
    before, after = (checkpoint.read([name])[name] for checkpoint in (source, rotated(source, 0)))
    before[:, 3] *= 40.0  # what a massive channel looks like
    spread = Rotation(64, 9).apply(before)
    peaks = [float(W.abs().max() / W.square().mean().sqrt()) for W in (before, spread)]
    assert peaks[1] < 0.5 * peaks[0]
    assert after.shape == before.shape


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gemma2", "feedforward_layernorm"), ("gemma3", "feedforward_layernorm"), ("opt", "embed_positions")],
)
def test_architectures_that_rotations_do_not_pass_are_refused(family, reason, tmp_path):
    source = open_checkpoint(str(build(family, tmp_path)))
    with pytest.raises(CheckpointError, match=rf"rotations cannot be folded .*{reason}.*leave --incoherence out"):
        rotated(source, 0)


def test_a_norm_that_is_more_than_it_is_named_is_refused(tmp_path, monkeypatch):
    source = open_checkpoint(str(build("llama", tmp_path)))

    def shifted(module, x):  # as Gemma's
        return torch.nn.functional.rms_norm(x, x.shape[-1:]) * (1.0 + module.weight)

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaRMSNorm.forward", shifted)
    with pytest.raises(CheckpointError, match="is no RMS norm times its weights"):
        rotated(source, 0)


def test_seed_changes_weights_and_identity_and_stands_in_the_configuration(tmp_path):
    source = open_checkpoint(str(build("llama-tied", tmp_path)))
    first, second = rotated(source, 1), rotated(source, 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(first.read([name])[name], second.read([name])[name])
    assert len({source.identity, first.identity, second.identity}) == 3
    assert not first.config.tie_word_embeddings and "lm_head.weight" in build_graph(first).rest
    assert getattr(first.config, CONFIG_KEY) == 1
    again = as_in(source, first.companions()["config.json"].decode())
    assert again == first
    assert as_in(source, source.config_json) is source


def test_checking_reads_what_tensors_are_made_from_and_rotates_nothing(tmp_path, monkeypatch):
    source = open_checkpoint(str(build("llama-tied", tmp_path)))
    turned, read = rotated(source, 0), []
    monkeypatch.setattr(Rotation, "apply", lambda *_: pytest.fail("rotated"))
    plain = type(source).read

    def noting(checkpoint, names):
        read.extend(names)
        return plain(checkpoint, names)

    monkeypatch.setattr(type(source), "read", noting)
    turned.check(["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
    assert set(read) == {
        "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    }  # fmt: skip


def test_what_is_damaged_is_named_as_it_was(tmp_path):
    turned = rotated(open_checkpoint(str(build("llama", tmp_path))), 0)
    broken = replace(turned, source=replace(turned.source, tensors={}))
    with pytest.raises(CheckpointError, match="holds no tensor"):
        broken.read(["model.embed_tokens.weight"])
