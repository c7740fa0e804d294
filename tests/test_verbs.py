"""The command line: exit codes, one line for each bad input, and what the verbs print."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from srr_dist import __main__, plan, quantize, status, verify
from srr_dist.config import JobConfig, QuantizeConfig

LATE_REFUSALS = [
    ({"model": "nowhere"}, "nowhere: no such file or folder"),
    ({"model": "org/name", "model_root": "/nowhere"}, "/nowhere/org/name"),
    ({"calibration": "missing.txt"}, "missing.txt: cannot be found"),
    ({"calibration": "image.png"}, "image.png"),
    ({"num_samples": 10**6}, "tokens found"),
    ({"seq_len": 10**6}, "seq_len: 1000000 tokens, but the model has 256 positions"),
    ({"group_size": 48}, "group_size: none of the 42 linear layers would be quantized"),
    ({"include": "nothing"}, "include"),
    ({"host_memory": "100MiB"}, "host_memory: one block at a time (model.layers."),
    ({"workers": 1000, "patience": 0}, "workers: 1000 asked for, but the cluster has 2 CPUs"),
]
EARLY_REFUSALS = [
    ({"bits": 9}, "bits: expected 2 to 8, found 9"),
    ({"rank": 0}, "rank: expected at least 1"),
    ({"split": "fixed:99"}, "split: expected fixed:K with K from 0 to the rank"),
    ({"exclude": "("}, "exclude: '(' is no regular expression"),
    ({"host_memory": "8 parrots"}, "host_memory: expected a size"),
    ({"calibration": None}, "calibration: expected text"),
    ({"output": None}, "output: expected a location"),
    ({"model": None}, "model: expected a location"),
    ({"recipe": "missing.yaml"}, "recipe: missing.yaml cannot be read"),
]


@pytest.mark.parametrize(("change", "message"), EARLY_REFUSALS + LATE_REFUSALS, ids=lambda value: str(value)[:40])
def test_bad_input_gets_one_line_that_names_it_and_leaves_nothing(job, tmp_path, capfd, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    before = set(tmp_path.iterdir())
    assert quantize.main(job.flags("out", **change)) == 2
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("srr-dist: ")]
    assert len(lines) == 1, captured.err
    assert message in lines[0]
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": "three"}, "--bits: invalid int value: 'three'"),
        ({"method": "gptq"}, "--method: invalid choice: 'gptq'"),
    ],
    ids=str,
)
def test_value_that_is_no_value_gets_the_usage_and_one_line(job, capsys, change, message):
    with pytest.raises(SystemExit) as caught:
        quantize.main(job.flags("out", **change))
    assert caught.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: srr-dist quantize --model")
    assert message in line


def test_unknown_key_of_a_recipe_is_named(job, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("ranks: 3\n")
    assert quantize.main(job.flags(tmp_path / "out", recipe=recipe)) == 2
    assert capsys.readouterr().err.startswith("srr-dist: ranks: no such option")


def test_output_that_is_a_file_is_refused_and_kept(job, tmp_path, capfd):
    output = tmp_path / "out"
    output.write_text("mine")
    assert quantize.main(job.flags(output)) == 2
    assert f"srr-dist: {output}: a file, expected a folder" in capfd.readouterr().err
    assert output.read_text() == "mine"


def test_cluster_that_does_not_answer_is_refused_at_once(job, tmp_path, capfd):
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert quantize.main(job.flags(tmp_path / "out", ray_address=address)) == 2
    assert f"ray_address: no Ray cluster answers at '{address}'" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_plan_needs_no_output_and_touches_none(job, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan.main(job.flags("", output=None)) == 0
    assert "windows        2" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_recipe_gives_the_options_and_flags_win(job, tmp_path, capfd):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bits: 5\ngroup-size: 16\nrank: 7\n")
    assert plan.main(job.flags("", output=None, recipe=recipe, rank=6)) == 0
    shown = capfd.readouterr().out
    assert "5 bits, group 16," in shown
    assert "rank 6," in shown


def test_status_before_a_run_says_so_and_creates_nothing(tmp_path, capsys):
    assert status.main([str(tmp_path / "out")]) == 2
    assert "no run has begun here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def state(output: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    assert status.main([str(output), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_status_of_a_finished_output(finished, job, capsys):
    found = state(finished, capsys)
    assert (found["done"], found["total"], found["damaged"], found["complete"]) == (7, 7, [], True)
    assert found["seconds_left"] == 0
    assert found["model"].endswith(job.model.name)
    assert status.main([str(finished)]) == 0
    shown = capsys.readouterr().out
    assert "7/7 committed" in shown
    assert "finished     yes" in shown


def test_status_of_a_run_in_the_middle(copied, capsys):
    (copied / "COMMIT").unlink()
    for block in (3, 4, 5):
        next(copied.glob(f".srr/*/blocks/{block:05d}.json")).unlink()
    found = state(copied, capsys)
    assert (found["done"], found["total"], found["damaged"], found["complete"]) == (4, 7, [], False)
    assert found["seconds_left"] > 0
    assert status.main([str(copied)]) == 0
    shown = capsys.readouterr().out
    assert "4/7 committed, about" in shown
    assert "finished     no" in shown


def test_status_names_damaged_units(copied, capsys):
    next(copied.glob(".srr/*/blocks/00002/*/base.safetensors")).unlink()
    next(copied.glob(".srr/*/blocks/00005.json")).write_text("{")
    found = state(copied, capsys)
    assert (found["done"], found["damaged"]) == (5, ["00002", "00005"])
    assert status.main([str(copied)]) == 0
    assert "unit 00002: its record does not count" in capsys.readouterr().out


def test_verify_names_every_damaged_file(copied, capsys):
    damaged = copied / "base" / "model-00002-of-00007.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    (copied / "adapter" / "adapter_config.json").unlink()
    assert verify.main([str(copied)]) == 1
    shown = capsys.readouterr().out
    assert "base/model-00002-of-00007.safetensors: its sha256" in shown
    assert "adapter/adapter_config.json" in shown
    assert "2 problems" in shown


def test_verify_of_nothing_fails(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 1
    assert "no COMMIT" in capsys.readouterr().out


@pytest.mark.parametrize("verb", __main__.VERBS)
def test_help_of_every_verb_lists_its_options(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        import_module(f"srr_dist.{verb}").main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: srr-dist" in shown
    if verb in ("quantize", "plan"):
        for field in (*fields(QuantizeConfig), *fields(JobConfig)):
            assert f"--{field.name.replace('_', '-')}" in shown


COMMANDS = {
    "console entry": [str(Path(sys.executable).with_name("srr-dist"))],
    "python -m": [sys.executable, "-m", "srr_dist"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_command_finds_its_verbs(command, tmp_path):
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=60)

    asked, nothing, unknown = call("--help"), call(), call("quantise")
    assert (asked.returncode, nothing.returncode, unknown.returncode) == (0, 2, 2)
    assert all(verb in asked.stdout for verb in __main__.VERBS)
    assert nothing.stderr == unknown.stderr == asked.stdout
    ended = call("status", str(tmp_path / "none"))
    assert ended.returncode == 2
    assert ended.stderr.startswith("srr-dist: ")
