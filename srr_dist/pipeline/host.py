"""What a worker process sees of its machine: device, free memory, its own peak."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource

import psutil
import torch


def worker_device() -> torch.device:
    """The GPU that Ray gave this process, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The hardware a record notes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def free_host_memory() -> int:
    """Bytes a new process could take."""
    return int(psutil.virtual_memory().available)


def free_gpu_memory() -> int | None:
    """Bytes free on the GPU, None without one."""
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def release_memory() -> None:
    """Give freed memory back to the system.

    The C library keeps what was freed for later, per thread and in pieces that the next block's tensors do not fit:
    without this a process grows with every block that passes through it.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes this process has held: resident on the host, and allocated on its GPU."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak
