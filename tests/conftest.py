"""What tests of several packages begin with: a checkpoint of six blocks, a text, a Ray cluster."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.commands import flags, run
from tests.families import build
from tests.s3 import SeaweedServer, environment, seaweed_server, set_variables

WORDS = ["river", "hill", "town", "mill", "water", "bridge", "road", "market", "railway", "church", "ford", "sea"]


settings.register_profile("shared machine", deadline=None)  # a busy machine makes no property false
settings.load_profile("shared machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start clusters come first: they wait a lot, and the last one of them would wait alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@contextmanager
def kept_torch_settings() -> Iterator[None]:
    """A stage owns its process and sets these for all of it; here they come back."""
    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(gradients)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    with kept_torch_settings():
        yield


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster of one node with two CPUs."""

    address: str
    raylet: int
    """Process id of the raylet, whose children the workers are."""


@dataclass(frozen=True)
class Job:
    """The options that the tests' runs have in common."""

    model: Path
    text: Path
    cluster: RayCluster

    def flags(self, output: Path | str, /, **changes: Any) -> list[str]:
        """Flags of ``quantize``; ``changes`` win, None leaves an option out."""
        options: dict[str, Any] = {
            "model": self.model,
            "calibration": self.text,
            "output": output,
            "num_samples": 8,
            "seq_len": 32,
            "rank": 4,
            "host_memory": "4GiB",  # given, so that no worker has to be asked
            "ray_address": self.cluster.address,
        }
        return flags(**{name: value for name, value in (options | changes).items() if value is not None})


@pytest.fixture(scope="session")
def six_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six blocks; not to be changed."""
    return build("llama", tmp_path_factory.mktemp("six-blocks"), num_hidden_layers=6)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some thousand tokens."""
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n".join(" ".join(chance.choices(WORDS, k=12)) for _ in range(600)))
    return path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """One cluster for all tests, since to start it takes as long as a run."""
    from ray.cluster_utils import Cluster  # only tests that need it wait for its import

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")
        head = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 150 * 10**6, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        yield RayCluster(cluster.address, cluster.head_node.all_processes["raylet"][0].process.pid)
        cluster.shutdown()


@pytest.fixture(scope="session")
def job(six_blocks: Path, text: Path, ray_cluster: RayCluster) -> Job:
    """The run that the tests repeat, disturb and vary."""
    return Job(six_blocks, text, ray_cluster)


@pytest.fixture(scope="session")
def finished(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of that run, undisturbed, started with relative paths; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    model, text = (os.path.relpath(path, folder) for path in (job.model, job.text))
    ended = run("quantize", *job.flags("out", model=model, calibration=text), cwd=folder)
    assert ended.code == 0, ended.err
    return folder / "out"


@pytest.fixture(scope="session")
def _seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    with seaweed_server(tmp_path_factory.mktemp("seaweed") / "data") as server:
        yield server


@pytest.fixture
def seaweed(_seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> SeaweedServer:
    """A real S3 server, one for all tests, with a bucket named "bucket"; AWS's variables lead to it."""
    set_variables(monkeypatch, environment(_seaweed.url))
    return _seaweed


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SeaweedServer]:
    """A real S3 server that a test may stop."""
    with seaweed_server(tmp_path / "data") as server:
        set_variables(monkeypatch, environment(server.url))
        yield server
