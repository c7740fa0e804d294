"""The figures of an evaluation against a plain computation in float64."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srr_dist.pipeline import comparison
from srr_dist.pipeline.comparison import Comparison, compare

VOCABULARY = 50


def logits(seed: int, tokens: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(tokens, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def token_ids(seed: int, tokens: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))


def reference(original: torch.Tensor, quantized: torch.Tensor, ids: torch.Tensor) -> Comparison:
    """Token by token, with Python's floats."""
    nll_original = nll = kl = overlap = 0.0
    agreement = 0
    for t in range(len(ids) - 1):
        rows = [[math.exp(float(value)) for value in row[t].double()] for row in (original, quantized)]
        p, q = ([value / sum(row) for value in row] for row in rows)
        label = int(ids[t + 1])
        nll_original -= math.log(p[label])
        nll -= math.log(q[label])
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        overlap += sum(map(min, p, q))
        agreement += p.index(max(p)) == q.index(max(q))
    return Comparison(len(ids) - 1, nll_original, nll, kl, agreement, overlap)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 20))
def test_comparison_equals_a_plain_computation(seed, tokens):
    original, ids = logits(seed, tokens), token_ids(seed, tokens)
    quantized = original + logits(seed + 1, tokens, 0.3)
    found, expected = compare(original, quantized, ids), reference(original, quantized, ids)
    assert (found.tokens, found.agreement) == (expected.tokens, expected.agreement)
    assert astuple(found) == pytest.approx(astuple(expected), rel=1e-5, abs=1e-5)


def test_model_compared_with_itself_has_no_divergence():
    original, ids = logits(0, 30), token_ids(0, 30)
    found = compare(original, original, ids)
    assert found.kl == 0.0
    assert found.nll == found.nll_original
    figures = found.figures()
    assert figures["top1_agreement"] == 1.0
    assert figures["expected_acceptance"] == pytest.approx(1.0)
    assert figures["perplexity"] == figures["perplexity_original"]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0.01, 5))
def test_divergence_is_positive_and_overlap_below_one(seed, spread):
    original = logits(seed, 10)
    found = compare(original, original + logits(seed + 1, 10, spread), token_ids(seed, 10))
    assert found.kl > 0
    assert 0 < found.overlap < found.tokens


@pytest.mark.parametrize("tokens", [2, 255, 256, 257, 258, 513, 600])
def test_comparison_does_not_depend_on_how_tokens_are_chunked(tokens, monkeypatch):
    original, quantized, ids = logits(1, tokens), logits(2, tokens), token_ids(3, tokens)
    chunked = compare(original, quantized, ids)
    monkeypatch.setattr(comparison, "_CHUNK", 10**6)
    assert chunked.tokens == tokens - 1
    assert astuple(chunked) == pytest.approx(astuple(compare(original, quantized, ids)), rel=1e-12)


def test_sum_of_two_texts_is_the_text_of_both():
    parts = [compare(logits(i, 9), logits(i + 10, 9), token_ids(i, 9)) for i in range(2)]
    joined = sum(parts, Comparison())
    assert astuple(joined) == tuple(a + b for a, b in zip(astuple(parts[0]), astuple(parts[1]), strict=True))
    assert joined.figures()["perplexity"] == pytest.approx(math.exp((parts[0].nll + parts[1].nll) / 16))


def test_token_that_the_original_rules_out_takes_no_part_in_the_divergence():
    original, ids = logits(0, 5), torch.tensor([0, 1, 2, 3, 4])
    original[:, 40] = -torch.inf
    found = compare(original, logits(1, 5), ids)
    assert math.isfinite(found.kl)
    assert found.kl > 0
