"""``evaluate`` against transformers and PEFT, in float64."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from srr_dist import verify
from srr_dist.checkpoint.source import open_checkpoint
from srr_dist.checkpoint.tokens import evaluation_tokens
from tests.commands import Ended, flags, run
from tests.conftest import Job
from tests.families import VOCAB_SIZE, build

SAMPLES, LENGTH = 5, 40
MEASURED = ("perplexity_original", "perplexity", "kl", "top1_agreement", "expected_acceptance")


def evaluate(job: Job, quantized: Path, *more: str, **changes) -> Ended:
    options = {
        "model": job.model,
        "quantized": quantized,
        "text": job.text,
        "num_samples": SAMPLES,
        "seq_len": LENGTH,
        "host_memory": "4GiB",
        "ray_address": job.cluster.address,
    }
    return run("evaluate", *flags(**(options | changes)), *more)


@pytest.fixture(scope="module")
def evaluated(job: Job, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The finished output with one evaluation, and its figures; not to be changed."""
    output = Path(shutil.copytree(finished, tmp_path_factory.mktemp("evaluated") / "out"))
    ended = evaluate(job, output)
    assert ended.code == 0, ended.err
    return output, json.loads(ended.out)


def reference(job: Job, output: Path) -> dict[str, float]:
    """The same figures from whole models and plain formulas."""
    original = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).double()
    base = AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, output / "adapter").double()
    tokenizer = open_checkpoint(str(job.model)).tokenizer()
    tokens = evaluation_tokens(str(job.text), tokenizer, num_samples=SAMPLES, seq_len=LENGTH, vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        log_p, log_q = (model(tokens.ids).logits[:, :-1].log_softmax(-1) for model in (original, adapted))
    p, q, labels = log_p.exp(), log_q.exp(), tokens.ids[:, 1:, None]
    return {
        "perplexity_original": float((-log_p.gather(-1, labels).mean()).exp()),
        "perplexity": float((-log_q.gather(-1, labels).mean()).exp()),
        "kl": float((p * (log_p - log_q)).sum(-1).mean()),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "expected_acceptance": float(torch.minimum(p, q).sum(-1).mean()),
    }


def test_figures_equal_those_of_transformers_and_peft(job, evaluated):
    output, figures = evaluated
    expected = reference(job, output)
    assert {name: figures[name] for name in MEASURED} == pytest.approx(expected, rel=1e-3)
    assert figures["tokens"] == SAMPLES * (LENGTH - 1)
    assert figures["kl"] > 1e-4  # else the comparison above says little


def test_figures_do_not_depend_on_the_number_of_workers(job, evaluated):
    output, figures = evaluated
    before = (output / "report.json").read_bytes()
    ended = evaluate(job, output, "--no-record", workers=2, blocks_per_stage=2)
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == figures
    assert (output / "report.json").read_bytes() == before


def test_figures_are_kept_with_the_output_and_shown_in_its_views(evaluated):
    output, figures = evaluated
    report = json.loads((output / "report.json").read_text())
    assert report["evaluations"] == [figures]
    card = (output / "README.md").read_text()
    assert "perplexity_original" in card
    assert f"{figures['tokens']:,} tokens" in card
    assert verify.main([str(output)]) == 0


def test_second_evaluation_on_the_same_text_replaces_the_first(job, evaluated, tmp_path):
    output = Path(shutil.copytree(evaluated[0], tmp_path / "out"))
    written = tmp_path / "figures.json"
    ended = evaluate(job, output, json=written)
    assert ended.code == 0, ended.err
    assert json.loads(written.read_text()) == json.loads(ended.out)
    assert json.loads((output / "report.json").read_text())["evaluations"] == [evaluated[1]]


def test_model_of_another_depth_is_refused(job, finished, tmp_path):
    other = build("llama", tmp_path / "other", num_hidden_layers=5)
    ended = evaluate(job, finished, model=other)
    assert ended.code == 2
    assert len(ended.complaint) == 1
    assert "6 decoder blocks" in ended.complaint[0]
    assert str(other) in ended.complaint[0]


def test_model_of_other_weights_is_refused(job, finished, tmp_path):
    other = build("llama", tmp_path / "other", num_hidden_layers=6, initializer_range=0.2)
    ended = evaluate(job, finished, "--no-record", model=other)
    assert ended.code == 2
    assert len(ended.complaint) == 1
    assert str(other) in ended.complaint[0]


def test_unfinished_output_is_refused(job, finished, tmp_path):
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    (output / "COMMIT").unlink()
    ended = evaluate(job, output)
    assert ended.code == 2
    assert "not a finished output" in ended.complaint[0]
