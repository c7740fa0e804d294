"""Kinds of hardware that a run can be forecast for: how fast each kind of work goes there, and what memory there is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from srr_dist.config import JobConfig, jobs_folder, load_mapping, parse_bytes
from srr_dist.errors import ConfigError
from srr_dist.pipeline.cluster import SHARE_OF_FREE, Cluster
from srr_dist.pipeline.memory import Budget
from srr_dist.pipeline.operations import KINDS


@dataclass(frozen=True)
class Hardware:
    """What one worker runs on.

    Attributes:
        kind: as in ``--gpus``.
        name: for people.
        measured: on what and when the rates were measured; "" where they are a data sheet's times an assumed share.
        gpu_memory: bytes, None without a GPU.
        host_memory: bytes of each worker.
        start: seconds from the command to the first block that is read.
        rates: kind of work (``operations.Work``) -> amount per second; of one thread without a GPU.
    """

    kind: str
    name: str
    measured: str
    gpu_memory: int | None
    host_memory: int
    start: float
    rates: Mapping[str, float]


def known_hardware() -> list[str]:
    """The kinds there are files for."""
    return sorted(path.stem.upper() for path in jobs_folder("hardware").glob("*.yaml"))


def load_hardware(kind: str) -> Hardware:
    """The file of a kind, any case.

    A rate is a number, or what the data sheet says and the share of it that is assumed to be reached.

    Raises:
        ConfigError: there is no such file, or it lacks a rate.
    """
    if kind.upper() not in known_hardware():
        raise ConfigError(f"gpus: no figures for {kind!r}; known are {', '.join(known_hardware())}")
    path = jobs_folder("hardware") / f"{kind.lower()}.yaml"
    content = load_mapping(path, "hardware")
    given: dict[str, Any] = content["rates"]
    if set(given) != set(KINDS):
        differing = ", ".join(sorted(set(given) ^ set(KINDS)))
        raise ConfigError(f"hardware: {path}: expected the rates {', '.join(KINDS)}; missing or unknown: {differing}")
    rates = {name: rate["peak"] * rate["share"] if isinstance(rate, dict) else rate for name, rate in given.items()}
    host_memory = parse_bytes(content["host_memory"], "host_memory")
    assert host_memory is not None
    return Hardware(
        kind=kind.upper(),
        name=content["name"],
        measured=content["measured"] or "",
        gpu_memory=parse_bytes(content.get("gpu_memory", ""), "gpu_memory"),
        host_memory=host_memory,
        start=content["start"],
        rates=rates,
    )


def imagined_cluster(gpus: str, job: JobConfig) -> tuple[Cluster, Hardware]:
    """The workers that ``8xH100`` stands for, one GPU each, with the memory they may use.

    Raises:
        ConfigError: it is not of this form, of no known kind, or ``workers`` says another number.
    """
    match = re.fullmatch(r"([1-9]\d*)x([\w-]+)", gpus)
    if match is None:
        raise ConfigError(f"gpus: expected a number and a kind as 8xH100, found {gpus!r}")
    count, hardware = int(match[1]), load_hardware(match[2])
    if job.workers not in (0, count):
        raise ConfigError(f"workers: {job.workers}, but --gpus {gpus} stands for {count} workers; give one of the two")
    host = parse_bytes(job.host_memory, "host_memory") or hardware.host_memory
    gpu = None
    if hardware.gpu_memory is not None:
        gpu = parse_bytes(job.gpu_memory, "gpu_memory") or int(SHARE_OF_FREE["gpu"] * hardware.gpu_memory)
    return Cluster(count, cpus=1, gpus=int(gpu is not None), budget=Budget(host, gpu)), hardware
