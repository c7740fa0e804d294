"""Zoo files: what they become, and that everything wrong in one is named at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from srr_dist.catalog.entries import Entry, Evaluation, read_zoo
from srr_dist.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
GOOD: dict[str, Any] = {
    "defaults": {"calibration": "text.txt", "num-samples": 4, "bits": 2},
    "evaluation": {"text": "other.txt", "seq_len": 64},
    "models": [
        {"name": "late", "model": "m", "recipes": ["a.yaml", "b.yaml"], "options": {"rank": 8}},
        {"name": "early", "model": "70B", "priority": 5},
    ],
}


@pytest.fixture(autouse=True)
def _recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("bits: 5\nrank: 4\n")
    Path("b.yaml").write_text("scaling: diag\n")
    Path("wrong.yaml").write_text("bits: 50\n")


def read(document: Any, output: str = "out") -> list[Entry]:
    Path("zoo.yaml").write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return read_zoo("zoo.yaml", output)


def test_models_times_recipes_become_entries_by_priority_then_order():
    early, first, second = read(GOOD, "s3://bucket/zoo/")
    assert [entry.name for entry in (early, first, second)] == ["early", "late-a", "late-b"]
    assert [entry.recipe for entry in (early, first, second)] == ["", "a", "b"]
    assert {entry.config.job.statistics for entry in (early, first, second)} == {"s3://bucket/zoo/statistics"}
    assert first.config.job.output == "s3://bucket/zoo/late-a"
    assert first.evaluation == Evaluation("other.txt", num_samples=8, seq_len=64)


def test_model_wins_over_recipe_over_defaults_over_preset():
    early, first, second = (entry.config.quantize for entry in read(GOOD))
    assert (first.rank, first.bits, first.num_samples) == (8, 5, 4)
    assert (second.rank, second.bits, second.scaling) == (8, 2, "diag")
    assert early.model == "meta-llama/Llama-3.1-70B"
    assert (early.rank, early.bits, early.seq_len, early.calibration) == (64, 2, 2048, "text.txt")


def test_entries_share_moments_where_all_that_decides_them_is_equal():
    early, first, second = read(GOOD)
    assert len({early.calibration, first.calibration, second.calibration}) == 3
    wider = read(GOOD | {"models": [GOOD["models"][0] | {"options": {"bits": 8, "include": "mlp"}}]})[0]
    assert wider.calibration == first.calibration
    alone = read({"models": [{"name": "n", "model": "m", "options": {"scaling": "identity"}}]})[0]
    assert alone.calibration is None


def test_settings_change_with_what_decides_the_result_and_not_with_how_it_is_run():
    settings = {entry.settings for entry in read(GOOD)}
    assert len(settings) == 3
    moved = read(GOOD | {"defaults": GOOD["defaults"] | {"workers": 2, "host_memory": "8GiB"}}, "elsewhere")
    assert {entry.settings for entry in moved} == settings
    others = [GOOD | {"evaluation": {"text": "third.txt"}}, GOOD | {"defaults": GOOD["defaults"] | {"seed": 1}}]
    assert all(settings.isdisjoint(entry.settings for entry in read(other)) for other in others)


MODEL = {"name": "n", "model": "m"}
REFUSED: list[tuple[Any, str]] = [
    ("a: [", "zoo: zoo.yaml is no YAML"),
    ("- a", "must be a mapping"),
    ({}, "models: is missing"),
    ({"models": []}, "models: expected at least one"),
    ({"models": {}}, "models: expected a list, found {}"),
    ({"models": [MODEL], "recipes": []}, "recipes: no such key; known are defaults, evaluation, models"),
    ({"models": [3]}, "model 1: expected a mapping with name, model, recipes, options, priority, found 3"),
    ({"models": [{"model": "m"}]}, "model 1: name: is missing"),
    ({"models": [MODEL | {"recipe": "a.yaml"}]}, "model 1: recipe: no such key"),
    ({"models": [MODEL | {"priority": "high"}]}, "priority: expected a int, found 'high'"),
    ({"models": [MODEL | {"priority": True}]}, "priority: expected a int, found True"),
    ({"models": [MODEL | {"recipes": [3]}]}, "recipes: expected paths of YAML files, found 3"),
    ({"models": [MODEL | {"recipes": ["none.yaml"]}]}, "model 1, n by none.yaml: recipe: none.yaml cannot be read"),
    ({"models": [MODEL | {"recipes": ["wrong.yaml"]}]}, "model 1, n by wrong.yaml: bits: expected 2 to 8, found 50"),
    ({"models": [MODEL | {"options": {"ranks": 1}}]}, "ranks: no such option"),
    ({"models": [MODEL | {"options": {"output": "x"}}]}, "output: is set by the zoo"),
    ({"models": [MODEL], "defaults": {"ray-address": "x"}}, "ray_address: is set by the zoo"),
    ({"models": [MODEL, MODEL]}, "n: the name of 2 results, expected one"),
    ({"models": [{"name": "logs", "model": "m"}]}, "name: expected letters"),
    ({"models": [{"name": "../up", "model": "m"}]}, "found '../up'"),
    ({"models": [{"name": ".srr", "model": "m"}]}, "found '.srr'"),
    ({"models": [{"name": "", "model": "m"}]}, "found ''"),
    ({"models": [MODEL], "evaluation": {}}, "evaluation: text: is missing"),
    ({"models": [MODEL], "evaluation": {"text": "t", "num_samples": "4"}}, "num_samples: expected a int"),
    ({"models": [MODEL], "evaluation": {"text": "t", "seq_len": 1}}, "evaluation: expected num_samples of at least 1"),
    ({"models": [MODEL], "defaults": {"calibration": ""}}, "calibration: expected text to calibrate on"),
]


@pytest.mark.parametrize(("document", "message"), REFUSED, ids=[message[:50] for _, message in REFUSED])
def test_wrong_zoo_file_is_refused_with_the_place_and_what_was_expected(document, message):
    if isinstance(document, dict) and "models" in document:
        document = {"defaults": {"calibration": "text.txt"}} | document
    with pytest.raises(ConfigError) as caught:
        read(document)
    assert message in str(caught.value)


def test_everything_that_is_wrong_is_named_at_once():
    models = [
        {"name": "one", "model": "m", "recipes": ["a.yaml", "wrong.yaml", "none.yaml"]},
        {"name": "two"},
        {"name": "three", "model": "m", "options": {"seed": -1}},
    ]
    with pytest.raises(ConfigError) as caught:
        read({"defaults": {"calibration": "t"}, "evaluation": {"text": 1}, "models": models})
    first, *lines = str(caught.value).splitlines()
    assert first == "zoo.yaml: nothing was started, 5 to correct"
    starts = ["evaluation: text:", "model 1, one by wrong.yaml: bits:", "model 1, one by none.yaml: recipe:"]
    starts += ["model 2: model: is missing", "model 3, three: seed:"]
    assert [line.strip().startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 5


def test_zoo_file_of_this_tree_is_right_and_its_recipes_share_moments(monkeypatch):
    monkeypatch.chdir(ROOT)
    entries = read_zoo("jobs/zoo.yaml", "s3://bucket/zoo")
    assert len(entries) > len({entry.calibration for entry in entries}) > 2
    assert all(entry.evaluation for entry in entries)
