"""Verbs as a user runs them, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT = 300


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> list[str]:
        """The lines on stderr that are no log."""
        return [line for line in self.err.splitlines() if line.startswith("srr-dist: ")]


def flags(**options: Any) -> list[str]:
    """``--name value`` of each option; True stands for a flag without value."""
    pairs = [
        [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])] for name, value in options.items()
    ]
    return [part for pair in pairs for part in pair]


def start(verb: str, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """``python -m srr_dist.VERB …``."""
    command = [sys.executable, "-m", f"srr_dist.{verb}", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for a command."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Ended(process.returncode, out, err)


def run(verb: str, *arguments: str, cwd: Path | None = None) -> Ended:
    """Start a command and wait for it."""
    return end(start(verb, *arguments, cwd=cwd))


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for something, which a command may be meant to bring about while it runs."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process is None or process.poll() is None, f"ended too early: {end(process).err}"
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
