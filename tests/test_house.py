"""The files around the package: what a person or a CI machine meets first must work and fit together."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from jobs import demo, demo_text
from srr_dist.config import RunConfig, load_recipe, resolve_options
from srr_dist.export.adapter import VLLM_MAX_RANKS

ROOT = Path(__file__).parent.parent
PRESETS = sorted((ROOT / "jobs" / "presets").glob("*.yaml"))
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))
SCRIPTS = [".ci/run", "jobs/submit.sh", "cluster/local.sh"]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [
        *project["dependencies"],
        *project["optional-dependencies"]["load"],
        *project["optional-dependencies"]["dev"],
    ]
    return [Requirement(text) for text in texts if not text.startswith("srr_dist")]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_by_its_name_is_a_complete_run_with_a_rank_that_vllm_serves(preset: Path) -> None:
    options = resolve_options({"model": preset.stem, "output": "memory://out"}, None)
    config = RunConfig.from_options(options)
    assert config.quantize.model.startswith("meta-llama/")
    assert config.quantize.rank in VLLM_MAX_RANKS
    assert config.quantize.calibration.count(":") == 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_with_a_model_a_text_and_an_output_is_a_complete_run(recipe: Path) -> None:
    given = {"model": "some/model", "calibration": "text.txt", "output": "memory://out", "statistics": "memory://kept"}
    config = RunConfig.from_options(resolve_options(given, str(recipe)))
    assert {name: getattr(config.quantize, name) for name in load_recipe(recipe)} == load_recipe(recipe)


def test_papers_recipe_over_a_preset_takes_the_method_of_one_and_the_text_of_the_other() -> None:
    recipe = str(ROOT / "jobs" / "recipes" / "paper.yaml")
    quantize = RunConfig.from_options(resolve_options({"model": "70B", "output": "memory://out"}, recipe)).quantize
    assert (quantize.split, quantize.form, quantize.grid, quantize.bits) == ("criterion", "split", "mxint", 3)
    assert (quantize.group_size, quantize.rank, quantize.seq_len) == (32, 64, 2048)


def test_demos_recipe_is_the_one_the_demo_uses_and_small_enough_for_minutes() -> None:
    recipe = load_recipe(ROOT / demo.RECIPE)
    assert recipe["num_samples"] * recipe["seq_len"] == 16 * 512


def test_runtime_environment_gives_a_stopped_job_time_to_stop() -> None:
    variables = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text())["env_vars"]
    assert all(isinstance(value, str) for value in variables.values())  # Ray refuses numbers
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > 60


def test_makefile_lists_its_targets_by_default() -> None:
    printed = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"make (\w+) - ", printed.stdout) == ["help", "env", "demo", "test", "lint", "clean"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_executable_and_stops_at_the_first_error(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in path.read_text()
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_constraints_pin_every_requirement_within_its_range() -> None:
    pinned = pins()
    outside = [str(need) for need in requirements() if pinned.get(canonicalize_name(need.name)) not in need.specifier]
    assert outside == []


def test_constraints_hold_one_version_of_the_aws_clients() -> None:
    pinned = pins()
    assert pinned["boto3"] == pinned["botocore"]


def test_demo_text_written_twice_is_the_same_prose_without_overlap(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    first, second = ([path.read_text() for path in demo_text.write_texts(folder)] for folder in folders)
    assert first == second
    calibration, evaluation = (text.split("\n\n") for text in first)
    assert min(len(text.split()) for text in first) > 4 * 512 * 2
    assert all(demo_text.is_prose(paragraph.strip()) for paragraph in calibration + evaluation)
    assert len(set(evaluation) & set(calibration)) < 0.05 * len(set(evaluation))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Every paragraph that is kept has at least a dozen words and ends properly.", True),
        ("Too short to be kept.", False),
        (">>> a paragraph that shows what an interpreter prints and then ends like prose.", False),
        ("x = f(a, b) y = g(c, d) z = h(e, f) u = v(w, q) t.", False),
        ("A heading or the beginning of a list that ends with a colon is not a sentence:", False),
    ],
)
def test_is_prose_tells_sentences_from_code_and_headings(text: str, expected: bool) -> None:
    assert demo_text.is_prose(text) is expected


def test_demo_refuses_a_model_with_other_bytes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not the model")
    with pytest.raises(SystemExit, match="expected b179c952"):
        demo.expect(file, demo.MODEL_SHA256)
