"""Ray: reach or start a cluster, see what its workers may use, and keep one actor per stage."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from srr_dist.config import JobConfig, parse_bytes
from srr_dist.errors import ConfigError, PipelineError
from srr_dist.pipeline.host import free_gpu_memory, free_host_memory
from srr_dist.pipeline.memory import Budget
from srr_dist.scratch import sweep

log = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 2**30  # of the embedded Ray; a few messages of 64 MiB are in flight
KNOCK_SECONDS = 10.0
POLL_SECONDS = 1.0
START_SECONDS = 300.0
"""A worker that has resources and does not start for so long is done without."""
_FAILED_STARTS = 4
# Readers are threads; with the C library's default of eight pools of freed memory a core, each keeps some. And threads
# that spin while they wait for one another take the cores from whatever else runs on the machine.
_WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "OMP_WAIT_POLICY": "PASSIVE"}
SHARE_OF_FREE = {"host": 0.8, "gpu": 0.9}


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
        ConfigError: no cluster answers at the address; it has nothing to work with; or this machine has fewer GPUs
            (without any: CPUs) than ``--workers``.
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
        yield _survey(job, job.patience if address else 0.0)
    finally:
        ray.shutdown()
        sweep()  # workers are killed, and on this machine no other may follow


def _require_answer(address: str) -> None:
    """Knock at ``[ray://]host:port``, where Ray itself would go on trying for minutes; OSError if nobody answers."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_SECONDS).close()


def _survey(job: JobConfig, patience: float) -> Cluster:
    """Count the nodes' resources and share them among the workers, once they have had ``patience`` seconds to come."""
    nodes = _awaited_nodes(max(job.workers, 1), patience)
    most, kind = _capacity(nodes)
    workers = job.workers or (most if kind == "GPU" else 1)
    if workers > most:  # Ray would wait for more nodes without end
        missing = f"workers: {workers} asked for, but the cluster has {most} {kind}s"
        if not (most and patience):
            raise ConfigError(f"{missing}; ask for at most {most}")
        log.warning("%s; going on with %d", missing, most)
        workers = most
    if kind == "GPU":
        return Cluster(workers, cpus=1, gpus=1, budget=_budget(job, per_node=1, gpus=1))
    if job.gpu_memory:
        log.warning("gpu_memory: the cluster has no GPUs, so %s has no effect", job.gpu_memory)
    per_node = -(-workers // len(nodes))
    cpus = max(1, int(min(node["CPU"] for node in nodes)) // per_node)
    return Cluster(workers, cpus, gpus=0, budget=_budget(job, per_node, gpus=0))


def _awaited_nodes(workers: int, patience: float) -> list[dict[str, float]]:
    """The nodes, once they have room for so many workers or ``patience`` seconds are over."""
    deadline, told = time.monotonic() + patience, False
    while (room := _capacity(nodes := _nodes())[0]) < workers and time.monotonic() < deadline:
        if not told:
            log.warning("room for %d of %d workers; waiting for nodes, up to %.0f s", room, workers, patience)
            told = True
        time.sleep(POLL_SECONDS)
    return nodes


def _capacity(nodes: list[dict[str, float]]) -> tuple[int, str]:
    """How many workers nodes have room for, and the kind of resource that each of them takes one of."""
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    return (gpus, "GPU") if gpus else (sum(int(node["CPU"]) for node in nodes), "CPU")


def _nodes() -> list[dict[str, float]]:
    """Resources of each node that is alive and has a CPU."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]


def _budget(job: JobConfig, per_node: int, gpus: int) -> Budget:
    """Bytes a worker may use: as told, or a share of what is free on the kind of node it will run on."""
    host, gpu = parse_bytes(job.host_memory, "host_memory"), parse_bytes(job.gpu_memory, "gpu_memory")
    if host is None or (gpus and gpu is None):
        free_host, free_gpu = ray.get(ray.remote(num_cpus=0, num_gpus=gpus)(_free_memory).remote())
        host = host or int(SHARE_OF_FREE["host"] * free_host / per_node)
        gpu = gpu or (int(SHARE_OF_FREE["gpu"] * free_gpu) if free_gpu else None)
    return Budget(host, gpu if gpus else None)


def _free_memory() -> tuple[int, int | None]:
    return free_host_memory(), free_gpu_memory()


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0))


class Pulse:
    """Base of what runs in an actor: a thread of its own answers while the others work."""

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> None:
        """A sign of life."""


class Worker:
    """One actor; ``seen`` once it has answered, ``silent`` if it was killed because it did not."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.seen = False
        self.silent = False

    def kill(self) -> None:
        """End the process; what it was asked fails at once, even if the process or its node does not answer."""
        ray.kill(self.handle)


class Actors:
    """One actor per stage. The driver replaces them itself: it knows what is committed, and Ray does not."""

    def __init__(self, cluster: Cluster, kind: type[Pulse], *arguments: Any) -> None:
        options: dict[str, Any] = {
            "num_cpus": cluster.cpus,
            "num_gpus": cluster.gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": "SPREAD",
            "concurrency_groups": {"pulse": 1, "commit": 1},
            "runtime_env": {"env_vars": _WORKER_ENVIRONMENT},
        }
        self._remote: Any = ray.remote(**options)(kind)
        self._cluster = cluster
        self._arguments = tuple(ray.put(argument) for argument in arguments)
        self._workers = [self._start() for _ in range(cluster.workers)]

    @property
    def handles(self) -> list[Any]:
        """Every actor, started or not."""
        return [worker.handle for worker in self._workers]

    def replace(self, worker: Worker) -> Worker:
        """Kill an actor and start another in its place."""
        worker.kill()
        self._workers[self._workers.index(worker)] = new = self._start()
        return new

    def gather(self, patience: float, silence: float, tick: Callable[[], None]) -> list[Worker]:
        """The workers that answer: all of them, or after a while those that the nodes at hand have room for.

        Dead ones are replaced on the way.

        Args:
            patience: seconds to wait for nodes that are gone.
            silence: seconds without an answer after which a worker that answered before is replaced; 0 for never.
            tick: called every second.

        Raises:
            PipelineError: none starts.
        """
        begun, failed = time.monotonic(), 0
        asked = {worker.handle.pulse.remote(): worker for worker in self._workers}
        answered: list[Worker] = []
        while asked:
            done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=POLL_SECONDS)
            waited = time.monotonic() - begun
            silent = [ref for ref in asked if asked[ref].seen and silence and waited > silence and ref not in done]
            for reference in [*done, *silent]:
                worker = asked.pop(reference)
                try:
                    ray.get(reference, timeout=0)
                    worker.seen = True
                    answered.append(worker)
                except RayError as error:
                    failed += not worker.seen
                    if failed >= _FAILED_STARTS * len(self._workers):
                        raise PipelineError(f"workers do not start, {failed} attempts failed, last: {error}") from error
                    log.warning("a worker is lost and replaced: %s", str(error).strip().replace("\n", " "))
                    replacement = self.replace(worker)
                    asked[replacement.handle.pulse.remote()] = replacement
            room = len(self._workers) if waited < patience else self._room()
            if answered and (len(answered) >= room or waited > patience + START_SECONDS):
                break
            if waited > patience + START_SECONDS:
                raise PipelineError(
                    f"no worker started in {waited:.0f} s; each needs {self._cluster.cpus} CPUs and "
                    f"{self._cluster.gpus} GPUs, the nodes that are alive have room for {self._room()}"
                )
            tick()
        return [worker for worker in self._workers if worker in answered]

    def _room(self) -> int:
        """How many workers the nodes that are alive can hold."""
        needs = {"CPU": self._cluster.cpus, "GPU": self._cluster.gpus}
        return sum(min(int(node.get(kind, 0)) // count for kind, count in needs.items() if count) for node in _nodes())

    def stop(self) -> None:
        """Kill the actors."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _start(self) -> Worker:
        return Worker(self._remote.remote(*self._arguments))
