"""Gradients taken block by block are those of the whole model, for each family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from srr_dist.calibration import head
from srr_dist.calibration.backward import BlockPass
from srr_dist.calibration.head import head_gradient, sample
from srr_dist.checkpoint.decoder import Decoder
from srr_dist.checkpoint.source import open_checkpoint
from tests.families import FAMILIES, VOCAB_SIZE, build
from tests.solve.problems import with_threads

LENGTH, SEED = 24, 7  # three sliding windows


def token_ids() -> Tensor:
    return torch.randint(3, VOCAB_SIZE, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@dataclass
class Walk:
    """What a walk back over the blocks delivers: per layer X and g, per block the gradient at its input."""

    layers: dict[str, tuple[Tensor, Tensor]]
    slopes: list[Tensor]


@torch.no_grad()
def forward(folder: Path, blocks: int, dtype: torch.dtype) -> tuple[Decoder, list[Tensor]]:
    """A decoder with blocks and head loaded, and the hidden states before each block and before the head."""
    decoder = Decoder(open_checkpoint(str(folder)), dtype=dtype)
    decoder.load_embedding()
    states = [decoder.embed(token_ids())]
    for index in range(blocks):
        decoder.load_block(index)
        states.append(decoder.run_block(index, states[-1]))
    decoder.load_head()
    return decoder, states


def back(decoder: Decoder, states: list[Tensor], seed: int, down_to: int = 0) -> Walk:
    walk = Walk({}, [head_gradient(decoder.logits, states[-1], seed, VOCAB_SIZE)])

    def keep(name: str, x: Tensor, g: Tensor) -> None:
        assert name not in walk.layers
        walk.layers[name] = (x, g)

    for index in reversed(range(down_to, len(states) - 1)):
        run, linears = partial(decoder.run_block, index), decoder.linear_modules(index)
        walk.slopes.insert(0, BlockPass(run, linears, states[index], keep).back(walk.slopes[0]))
    return walk


def walked(folder: Path, blocks: int, dtype: torch.dtype, seed: int = SEED) -> Walk:
    return back(*forward(folder, blocks, dtype), seed)


def labels_of(logits: Tensor, seed: int = SEED) -> Tensor:
    draws = torch.rand(LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return sample(logits.softmax(-1), draws)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_each_family_equal_autograd_on_the_whole_model(tmp_path: Path, family: str) -> None:
    folder = build(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    entering: list[Tensor] = []
    for block in model.get_decoder().layers:
        block.register_forward_pre_hook(lambda _, args: args[0].retain_grad() or entering.append(args[0]))
    logits = model(token_ids(), use_cache=False).logits[0]
    nn.functional.cross_entropy(logits, labels_of(logits.detach()), reduction="sum").backward()
    walk = walked(folder, len(entering), torch.float64)
    for slope, hidden in zip(walk.slopes, entering, strict=False):
        torch.testing.assert_close(slope, hidden.grad, rtol=1e-9, atol=1e-12)
    weights = {
        name: module.weight.grad
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    }
    assert walk.layers.keys() == weights.keys()
    for name, (x, g) in walk.layers.items():
        torch.testing.assert_close(g.mT @ x, weights[name], rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=2)


def bits(walk: Walk) -> list[Tensor]:
    return [*walk.slopes, *(tensor for pair in walk.layers.values() for tensor in pair)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_walk_is_bitwise_the_same_for_any_threads(llama: Path, dtype: torch.dtype) -> None:
    first, second = (with_threads(n, lambda: bits(walked(llama, 2, dtype))) for n in (1, 2))
    assert all(map(torch.equal, first, second))
    assert {tensor.dtype for tensor in first} == {dtype}


def test_walk_leaves_weights_without_gradients_and_the_block_without_hooks(llama: Path) -> None:
    decoder = Decoder(open_checkpoint(str(llama)), dtype=torch.float32)
    decoder.load_block(0)
    linears, h, delivered = decoder.linear_modules(0), torch.randn(1, 5, 64), []
    passed = BlockPass(partial(decoder.run_block, 0), linears, h, lambda *_: delivered.append(1))
    assert delivered == []
    assert torch.equal(passed.output, decoder.run_block(0, h))
    passed.back(torch.ones_like(h))
    assert len(delivered) == 7
    assert all(p.grad is None and not p.requires_grad for p in decoder.block(0).parameters())
    assert not any(module._forward_hooks for module in linears.values())


def head_of(vocabulary: int) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(3)
    return nn.Linear(16, vocabulary, bias=False).double(), torch.randn(1, 50, 16, dtype=torch.float64)


@pytest.mark.parametrize("at_once", [1, 700, 3000, 2**23])
def test_head_gradient_is_autograds_however_many_logits_are_alive(monkeypatch, at_once):
    output, hidden = head_of(100)
    leaf = hidden.clone().requires_grad_()
    scores, draws = output(leaf)[0], torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    labels = sample(scores.detach().softmax(-1), draws)
    nn.functional.cross_entropy(scores, labels, reduction="sum").backward()
    seen: list[Tensor] = []
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(head, "sample", lambda p, u: seen.append(sample(p, u)) or seen[-1])
    found = head_gradient(output, hidden, 5, 100)
    assert torch.equal(torch.cat(seen), labels)
    assert max(len(piece) for piece in seen) * 100 <= max(at_once, 100)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-9, atol=1e-12)


def test_head_gradient_depends_on_its_seed_alone(llama: Path) -> None:
    first, again, other = (walked(llama, 2, torch.float32, seed).slopes[-1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_have_the_frequencies_of_their_probabilities() -> None:
    p = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    draws = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(sample(p.expand(40_000, 5), draws), minlength=5)
    assert counts[1] == counts[4] == 0
    torch.testing.assert_close(counts / 40_000, p, rtol=0, atol=0.01)


def test_labels_at_the_ends_of_the_draw_have_a_probability() -> None:
    p = torch.tensor([[0.0, 0.25, 0.75, 0.0]]).expand(3, 4)
    assert sample(p, torch.tensor([0.0, 0.25, 1.0 - 2.0**-53], dtype=torch.float64)).tolist() == [1, 2, 2]


@torch.no_grad()
def test_gradients_of_drawn_labels_foretell_the_divergence_of_a_small_error(llama: Path) -> None:
    """``KL(original ‖ with W + Δ) ≈ ½ E_s⟨Δ, G_s⟩²``, which holds for the model's own labels alone."""
    name, draws = "model.layers.1.mlp.up_proj", 300
    decoder, states = forward(llama, 2, torch.float64)
    weight = decoder.linear_modules(1)[name].weight
    error = 1e-4 * torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    pairs = (back(decoder, states, seed, down_to=1).layers[name] for seed in range(draws))
    foretold = sum(float((x @ error.mT * g).sum()) ** 2 for x, g in pairs) / draws / 2
    before = decoder.logits(states[-1])[0].log_softmax(-1)
    weight += error
    after = decoder.logits(decoder.run_block(1, states[1]))[0].log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum())
    assert foretold == pytest.approx(divergence, rel=0.3)  # the mean of 300 squares is good to 8 %
