"""Work on single CPU threads: torch's products and sums then come out the same on any number of cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run what is inside on one CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(function: Callable[[A], B], items: Iterable[A], at_once: int) -> Iterator[B]:
    """``function`` of every item, in their order, so many at once; each on one thread, without gradients."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(at_once, initializer=_alone) as pool:
            yield from pool.map(function, items)
    finally:
        torch.set_num_threads(threads)  # one of the settings belongs to the process


def _alone() -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
