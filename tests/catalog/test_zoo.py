"""``python -m srr_dist.zoo`` with real models on a real cluster: killed, stopped and resumed to the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs.demo import fetch_model
from srr_dist import zoo
from srr_dist.catalog.entries import read_zoo
from srr_dist.config import RunConfig
from srr_dist.pipeline.driver import quantize
from srr_dist.store import ObjectStore, RunArea
from tests.commands import Ended, end, flags, start, wait_until
from tests.conftest import RayCluster
from tests.families import build

RECORDS = "/.srr/*/blocks/*.json"
GOOD = ["qwen3-four", "qwen3-three", "smollm2"]
CHEAP = {"method": "qer", "scaling": "diag", "scales": "absmax", "iterations": 0, "descent": 0, "blocks_per_stage": 4}
OPTIONS = {"num_samples": 4, "seq_len": 32, "rank": 4, "host_memory": "4GiB", "blocks_per_stage": 1}


@dataclass(frozen=True)
class Zoo:
    """SmolLM2, a random model of another family under two recipes, and between them one model that does not exist."""

    file: Path
    output: Path
    cluster: RayCluster

    def arguments(self, **more: Any) -> list[str]:
        return [str(self.file), *flags(output=self.output, ray_address=self.cluster.address, **more)]

    def results(self) -> dict[str, dict[str, Any]]:
        index = ObjectStore(str(self.output)).get_json("index.json")
        return {row["name"]: row for row in index["results"]}

    def manifests(self) -> dict[str, bytes]:
        return {name: (self.output / name / "manifest.json").read_bytes() for name in GOOD}

    def run(self, *milestones: str, sign: int | None = None, concurrency: int = 1) -> Ended:
        """Start the zoo, wait for these files in turn, send it a signal if there is one, and wait for its end."""
        process = start("zoo", *self.arguments(concurrency=concurrency))
        try:
            for pattern in milestones:
                wait_until(lambda pattern=pattern: list(self.output.glob(pattern)), process)
            children = psutil.Process(process.pid).children(recursive=True)
            if sign is not None:
                process.send_signal(sign)
            ended = end(process)
        finally:
            process.kill()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert alive == []
        return ended


@pytest.fixture(scope="module")
def a_zoo(ray_cluster: RayCluster, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    folder = tmp_path_factory.mktemp("zoo")
    models = [
        {"name": "none", "model": str(folder / "none")},
        {"name": "smollm2", "model": str(fetch_model().absolute()), "priority": 1, "options": CHEAP},
        {
            "name": "qwen3",
            "model": str(build("qwen3", folder / "qwen", num_hidden_layers=2)),
            "recipes": [str(folder / "three.yaml"), str(folder / "four.yaml")],
        },
    ]
    (folder / "three.yaml").write_text("bits: 3\n")
    (folder / "four.yaml").write_text("bits: 4\nsplit: criterion\nexclude: q_proj\n")
    document = {
        "defaults": OPTIONS | {"calibration": str(text)},
        "evaluation": {"text": str(text), "num_samples": 2, "seq_len": 32},
        "models": models,
    }
    (folder / "zoo.yaml").write_text(yaml.safe_dump(document))
    yield Zoo(folder / "zoo.yaml", folder / "out", ray_cluster)


@pytest.fixture(scope="module")
def alone(a_zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The manifests of the same runs, each by itself and without statistics."""
    folder, manifests = tmp_path_factory.mktemp("alone"), {}
    for entry in read_zoo(str(a_zoo.file), str(folder), a_zoo.cluster.address):
        if entry.name not in GOOD:
            continue
        options = vars(entry.config.quantize) | vars(entry.config.job) | {"statistics": "", "blocks_per_stage": 4}
        quantize(RunConfig.from_options(options))
        manifests[entry.name] = (folder / entry.name / "manifest.json").read_bytes()
    return manifests


@pytest.mark.slow
def test_zoo_killed_stopped_and_resumed_ends_with_every_result_as_if_made_alone(a_zoo, alone):
    assert a_zoo.run("smollm2" + RECORDS, sign=signal.SIGKILL).code == -signal.SIGKILL
    finished_one = ("smollm2/COMMIT", "results/smollm2.json", "qwen3-three" + RECORDS)
    stopped = a_zoo.run(*finished_one, sign=signal.SIGTERM)
    assert stopped.code == 75, stopped.err
    assert "run the same command again to go on" in stopped.complaint[0]
    assert a_zoo.results()["qwen3-three"]["status"] == "stopped"

    ended = a_zoo.run("qwen3-three/COMMIT", "results/qwen3-three.json", "results/qwen3-four.json", concurrency=2)
    assert ended.code == 1, ended.err
    assert "3 of 4 results are done, 1 failed" in ended.complaint[0]
    results = a_zoo.results()
    assert {name: row["status"] for name, row in results.items()} == dict.fromkeys(GOOD, "done") | {"none": "failed"}
    assert "no such file or folder" in results["none"]["note"]
    assert all(results[name]["figures"]["kl"] > 0 for name in GOOD)
    assert results["qwen3-three"]["figures"]["bits_per_weight"] < results["qwen3-four"]["figures"]["bits_per_weight"]
    for name in GOOD:
        assert (a_zoo.output / results[name]["report"]).exists()
        assert "everything is as recorded" in (a_zoo.output / results[name]["log"]).read_text()
    assert a_zoo.manifests() == alone


@pytest.mark.slow
def test_second_recipe_passed_no_sequence_for_the_first_ones_moments(a_zoo):
    store = ObjectStore(str(a_zoo.output / "qwen3-four"))
    records = RunArea(store, RunArea.find(store)[0]).records()
    assert {record.seconds.get("calibrate", 0.0) for record in records.values()} == {0.0}
    assert "no passes for these" in (a_zoo.output / "logs" / "qwen3-four.log").read_text()


@pytest.mark.slow
def test_finished_zoo_tries_only_what_failed_and_touches_nothing_else(a_zoo, capfd):
    before = {path: path.stat().st_mtime_ns for name in GOOD for path in (a_zoo.output / name).rglob("*")}
    assert zoo.main(a_zoo.arguments()) == 1
    assert {path: path.stat().st_mtime_ns for name in GOOD for path in (a_zoo.output / name).rglob("*")} == before
    assert "3 of 4 results are done, 1 failed" in capfd.readouterr().err


def test_dry_run_prints_the_order_and_writes_nothing(a_zoo, tmp_path, capsys):
    assert zoo.main([str(a_zoo.file), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["queued", f"{name}:"] for name in ("smollm2", "none", "qwen3-three", "qwen3-four")
    ]
    assert "--bits=4" in lines[3]
    assert not (tmp_path / "out").exists()


def test_wrong_zoo_file_starts_nothing_and_gets_code_2(a_zoo, tmp_path, capsys):
    (tmp_path / "zoo.yaml").write_text("models: [{name: a, model: m, options: {bits: 1}}]")
    assert zoo.main([str(tmp_path / "zoo.yaml"), "--output", str(tmp_path / "out")]) == 2
    assert "model 1, a: bits: expected 2 to 8, found 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_concurrency_of_none_is_refused(a_zoo, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        zoo.main([str(a_zoo.file), "--output", str(tmp_path / "out"), "--concurrency", "0"])
    assert caught.value.code == 2
    assert "--concurrency: expected at least 1, found 0" in capsys.readouterr().err
