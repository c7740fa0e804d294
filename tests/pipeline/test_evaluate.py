"""``evaluate`` against transformers and PEFT, in float64."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stdout
from dataclasses import astuple, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from srr_dist import evaluate as verb
from srr_dist import quantize, verify
from srr_dist.calibration import head
from srr_dist.checkpoint.graph import build_graph
from srr_dist.checkpoint.source import open_checkpoint
from srr_dist.checkpoint.tokens import evaluation_tokens
from srr_dist.export import QuantizedModel, add_evaluation
from srr_dist.pipeline.comparison import Comparison
from srr_dist.pipeline.evaluation import EvaluationStage
from srr_dist.store import ObjectStore
from tests.commands import flags
from tests.conftest import Job
from tests.families import VOCAB_SIZE, build

pytestmark = pytest.mark.slow

SAMPLES, LENGTH = 5, 40
MEASURED = ("perplexity_original", "perplexity", "kl", "top1_agreement", "expected_acceptance")


def options(job: Job, quantized: Path, **changes) -> list[str]:
    given = {
        "model": job.model,
        "quantized": quantized,
        "text": job.text,
        "num_samples": SAMPLES,
        "seq_len": LENGTH,
        "host_memory": "4GiB",
        "ray_address": job.cluster.address,
    }
    return flags(**(given | changes))


@dataclass(frozen=True)
class Evaluated:
    """A finished output, evaluated without and then with a record."""

    output: Path
    unrecorded: dict[str, Any]
    report: dict[str, Any]
    """report.json after the first."""
    recorded: dict[str, Any]
    file: dict[str, Any]
    """What ``--json`` wrote."""


@pytest.fixture(scope="module")
def evaluated(job: Job, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """Evaluated by one worker, then by two; not to be changed."""
    folder = tmp_path_factory.mktemp("evaluated")
    output = Path(shutil.copytree(finished, folder / "out"))
    assert verb.main(options(job, output, no_record=True, json=folder / "unrecorded.json")) == 0
    unrecorded = json.loads((folder / "unrecorded.json").read_text())
    report = json.loads((output / "report.json").read_text())
    with redirect_stdout(StringIO()) as printed:
        assert verb.main(options(job, output, workers=2, blocks_per_stage=2, json=folder / "figures.json")) == 0
    written = json.loads((folder / "figures.json").read_text())
    return Evaluated(output, unrecorded, report, json.loads(printed.getvalue()), written)


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
    figures = evaluated.unrecorded
    assert {name: figures[name] for name in MEASURED} == pytest.approx(reference(job, evaluated.output), rel=1e-3)
    assert figures["tokens"] == SAMPLES * (LENGTH - 1)
    assert figures["kl"] > 1e-4  # else the comparison above says little


def test_figures_do_not_depend_on_the_number_of_workers(evaluated):
    assert evaluated.recorded == evaluated.unrecorded == evaluated.file


def test_figures_do_not_depend_on_how_many_tokens_have_their_logits_in_memory(job, finished, monkeypatch):
    checkpoint, seen = open_checkpoint(str(job.model)), list[int]()
    ids = torch.randint(VOCAB_SIZE, (2, LENGTH), generator=torch.Generator().manual_seed(0)).numpy()

    def compared(at_once: int) -> Comparison:
        monkeypatch.setattr(head, "LOGITS_AT_ONCE", at_once * VOCAB_SIZE)
        stage = EvaluationStage(checkpoint, QuantizedModel.open(str(finished)), torch.float32, 1)
        stage.open(tuple(range(len(build_graph(checkpoint).blocks))), first=True)
        last = stage.forward(stage.embed(ids))
        stage.open_head()
        logits = stage.original.logits
        monkeypatch.setattr(stage.original, "logits", lambda states: (seen.append(states.shape[1]), logits(states))[1])
        return stage.score(last, ids)

    whole = compared(LENGTH)
    assert set(seen) == {LENGTH - 1}
    seen.clear()
    assert astuple(compared(7)) == pytest.approx(astuple(whole), rel=1e-5)
    assert set(seen) == {7, (LENGTH - 1) % 7}


def test_figures_are_kept_with_the_output_and_shown_in_its_views(evaluated):
    report = json.loads((evaluated.output / "report.json").read_text())
    assert report["evaluations"] == [evaluated.recorded]
    card = (evaluated.output / "README.md").read_text()
    assert "perplexity_original" in card
    assert f"{evaluated.recorded['tokens']:,} tokens" in card
    assert verify.main([str(evaluated.output)]) == 0


def test_figures_that_are_not_to_be_recorded_leave_the_output_as_it_is(evaluated):
    assert evaluated.report["evaluations"] == []


def test_second_evaluation_on_the_same_text_replaces_the_first(evaluated, tmp_path):
    output = Path(shutil.copytree(evaluated.output, tmp_path / "out"))
    again, other = evaluated.recorded | {"kl": 0.5}, evaluated.recorded | {"text_sha256": "00" * 32}
    add_evaluation(ObjectStore(str(output)), again)
    assert json.loads((output / "report.json").read_text())["evaluations"] == [again]
    add_evaluation(ObjectStore(str(output)), other)
    found = json.loads((output / "report.json").read_text())["evaluations"]
    assert sorted(each["kl"] for each in found) == sorted([again["kl"], other["kl"]])


def test_rotated_output_is_compared_in_the_same_basis_and_loads(job, evaluated, tmp_path):
    output = tmp_path / "rotated"
    assert quantize.main(job.flags(output, incoherence=True)) == 0
    assert verb.main(options(job, output, no_record=True, json=tmp_path / "figures.json")) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {name: figures[name] for name in MEASURED} == pytest.approx(reference(job, output), rel=1e-3)
    assert figures["perplexity_original"] == pytest.approx(evaluated.unrecorded["perplexity_original"], rel=1e-4)
    assert figures["kl"] != pytest.approx(evaluated.unrecorded["kl"], rel=1e-3)
    assert verify.main([str(output)]) == 0


def refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that bad input gets."""
    assert verb.main(arguments) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    (line,) = (line for line in captured.err.splitlines() if line.startswith("srr-dist: "))
    return line


def test_model_of_another_depth_is_refused(job, finished, tmp_path, capfd):
    other = build("llama", tmp_path / "other", num_hidden_layers=5)
    line = refused(options(job, finished, model=other), capfd)
    assert "of 6 decoder blocks" in line
    assert f"{other} is" in line


def test_model_of_other_weights_is_refused(job, finished, tmp_path, capfd):
    other = build("llama", tmp_path / "other", num_hidden_layers=6, initializer_range=0.2)
    line = refused(options(job, finished, model=other), capfd)
    assert "name the model it was made from" in line
    assert f"{other} is" in line


def test_unfinished_output_is_refused(job, finished, tmp_path, capfd):
    output = Path(shutil.copytree(finished, tmp_path / "out"))
    (output / "COMMIT").unlink()
    assert "not a finished output" in refused(options(job, output), capfd)
