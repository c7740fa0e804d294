"""Ray: reach or start a cluster, see what its workers may use, and keep one actor per stage."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from srr_dist.config import JobConfig, parse_bytes
from srr_dist.errors import ConfigError
from srr_dist.pipeline.host import free_gpu_memory, free_host_memory
from srr_dist.pipeline.memory import Budget

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 2**30  # of the embedded Ray; a few messages of 64 MiB are in flight
KNOCK_SECONDS = 10.0
_SHARE_OF_FREE = {"host": 0.8, "gpu": 0.9}


@dataclass(frozen=True)
class Cluster:
    """What the stages of a run are given; nothing of it changes the result."""

    workers: int
    cpus: int
    """Threads of each worker."""
    gpus: int
    """1 where every worker has a GPU, else 0."""
    budget: Budget


@contextmanager
def connected(job: JobConfig) -> Iterator[Cluster]:
    """Join the Ray cluster of ``--ray-address`` or RAY_ADDRESS, or start one in this process's machine.

    Raises:
        ConfigError: no cluster answers at the address, or it has fewer GPUs (without any: CPUs) than ``--workers``.
    """
    address = job.ray_address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    try:
        if address:
            _require_answer(address)
            ray.init(address=address, **quiet)
        else:
            # Ray runs workers at nice 15, so that any other process starves them; here they are the machine's work.
            os.environ.setdefault("RAY_worker_niceness", "0")
            # Readers are threads; with the C library's default of eight pools of freed memory a core, each keeps some.
            os.environ.setdefault("MALLOC_ARENA_MAX", "2")
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=_usable_cpus(),
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(f"ray_address: no Ray cluster answers at {address!r}: {error}") from error
    try:
        yield _survey(job)
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Knock at ``[ray://]host:port``, where Ray itself would go on trying for minutes; OSError if nobody answers."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()


def _survey(job: JobConfig) -> Cluster:
    """Count the nodes' resources and share them among the workers."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    workers = job.workers or gpus or 1
    most, kind = (gpus, "GPUs") if gpus else (sum(int(node["CPU"]) for node in nodes), "CPUs")
    if workers > most:  # Ray would wait for more nodes without end
        raise ConfigError(f"workers: {workers} asked for, but the cluster has {most} {kind}; ask for at most {most}")
    if gpus:
        return Cluster(workers, cpus=1, gpus=1, budget=_budget(job, per_node=1, gpus=1))
    if job.gpu_memory:
        log.warning("gpu_memory: the cluster has no GPUs, so %s has no effect", job.gpu_memory)
    per_node = -(-workers // len(nodes))
    cpus = max(1, int(min(node["CPU"] for node in nodes)) // per_node)
    return Cluster(workers, cpus, gpus=0, budget=_budget(job, per_node, gpus=0))


def _budget(job: JobConfig, per_node: int, gpus: int) -> Budget:
    """Bytes a worker may use: as told, or a share of what is free on the kind of node it will run on."""
    host, gpu = parse_bytes(job.host_memory, "host_memory"), parse_bytes(job.gpu_memory, "gpu_memory")
    if host is None or (gpus and gpu is None):
        free_host, free_gpu = ray.get(ray.remote(num_cpus=0, num_gpus=gpus)(_free_memory).remote())
        host = host or int(_SHARE_OF_FREE["host"] * free_host / per_node)
        gpu = gpu or (int(_SHARE_OF_FREE["gpu"] * free_gpu) if free_gpu else None)
    return Budget(host, gpu if gpus else None)


def _free_memory() -> tuple[int, int | None]:
    return free_host_memory(), free_gpu_memory()


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0))


class Actors:
    """One actor per stage, replaced when one of them dies."""

    def __init__(self, cluster: Cluster, kind: type, *arguments: Any) -> None:
        self._remote: Any = ray.remote(
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus,
            max_restarts=0,  # the driver replaces workers itself: it knows what is committed
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )(kind)
        self._arguments = tuple(ray.put(argument) for argument in arguments)
        self._count = cluster.workers
        self.handles: list[Any] = []
        self.start()

    def start(self) -> None:
        """Kill what is left of the actors and start all of them anew."""
        self.stop()
        self.handles = [self._remote.remote(*self._arguments) for _ in range(self._count)]

    def stop(self) -> None:
        """Kill the actors."""
        for handle in self.handles:
            ray.kill(handle)
        self.handles = []
