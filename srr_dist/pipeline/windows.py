"""Which blocks are worked on next, and by which stage: pure functions of what is committed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Window:
    """Blocks that the stages hold at once.

    Attributes:
        start: first block; the sequences enter from the boundary in front of it.
        stages: per stage its blocks; together ``start, start + 1, …`` where sequences pass.
        collect: blocks that are solved; the others are committed already and only passed through.
        save: block before which what leaves the window is stored, hidden states or the gradients that come back; None
            where no other block needs it.
        passes: whether sequences pass through the blocks; if not, each can be solved without them.
        then: what follows once they have passed: ``solve`` the blocks to collect; take gradients ``back`` through all
            blocks, for the sketches of those to collect; ``weigh`` what widths would do to them; or ``nothing``, where
            moments alone are collected.
    """

    start: int
    stages: tuple[tuple[int, ...], ...]
    collect: frozenset[int]
    save: int | None
    passes: bool = True
    then: str = "solve"

    @property
    def blocks(self) -> list[int]:
        """Every block of the window, in order."""
        return [block for stage in self.stages for block in stage]


def next_window(
    pending: Collection[int],
    boundaries: Collection[int],
    stages: int,
    blocks_per_stage: int,
    suspects: Collection[int] = (),
) -> Window:
    """The window that works on the first pending block.

    Args:
        pending: blocks without a result; not empty.
        boundaries: blocks in front of which activations are stored; holds 0.
        stages: workers at hand.
        blocks_per_stage: blocks each may hold.
        suspects: blocks that have a window to themselves, so that what goes wrong in it is theirs.
    """
    first, last = min(pending), max(pending)
    start = max(boundary for boundary in boundaries if boundary <= first)
    stop = min(start + stages * blocks_per_stage, last + 1)
    if first in suspects:
        stop = min(stop, first + 1)
    stop = min([stop, *(block for block in suspects if block > first)])
    parts = even_parts(range(start, stop), stages)
    return Window(start, parts, frozenset(pending) & frozenset(range(start, stop)), stop if stop <= last else None)


def next_window_at_rest(
    ready: Collection[int],
    stages: int,
    blocks_per_stage: int,
    suspects: Collection[int] = (),
    then: str = "solve",
) -> Window:
    """The window that solves or weighs the first of the blocks, not empty, which no sequence has to pass any more.

    Suspects come last, each in a window to itself.
    """
    blocks = sorted(set(ready).difference(suspects))[: stages * blocks_per_stage] or [min(ready)]
    return Window(blocks[0], even_parts(blocks, stages), frozenset(blocks), save=None, passes=False, then=then)


def next_window_back(
    pending: Collection[int],
    uncalibrated: Collection[int],
    boundaries: Collection[int],
    gradients: Collection[int],
    stages: int,
    blocks_per_stage: int,
) -> Window:
    """The window that brings gradients nearer to the last of the blocks, which are reached from the model's end.

    Gradients come back through a window that begins at a boundary. Where none is near enough, one is made: a window of
    forward passes ends where the next one back is to begin, so that of a whole model each window is passed forward
    first, and then each back, the last one first.

    Args:
        pending: blocks without a sketch; not empty.
        uncalibrated: blocks whose moments are not kept, which forward passes collect on their way.
        boundaries: blocks in front of which activations are stored; holds 0.
        gradients: blocks in front of which gradients are stored; holds the number of blocks, where the head begins.
        stages: as for ``next_window``.
        blocks_per_stage: as for ``next_window``.
    """
    most = stages * blocks_per_stage
    stop = min(place for place in gradients if place > max(pending))
    lowest = max(stop - most, 0)
    if near := [boundary for boundary in boundaries if lowest <= boundary < stop]:
        start = min(near)
        parts = even_parts(range(start, stop), stages)
        save = start if min(pending) < start else None
        return Window(start, parts, frozenset(pending) & frozenset(range(start, stop)), save, then="back")
    start = max(boundary for boundary in boundaries if boundary < lowest)
    end = min(start + most, lowest)
    collect = frozenset(uncalibrated) & frozenset(range(start, end))
    return Window(start, even_parts(range(start, end), stages), collect, end, then="nothing")


def following(window: Window, pending: Collection[int], stages: int, blocks_per_stage: int) -> Window | None:
    """The window after this one if nothing goes wrong, None if there is none: a guess for whoever prepares it.

    Args:
        window: the one to come.
        pending: blocks without a result, those of the window among them.
        stages: as for ``next_window``.
        blocks_per_stage: as for ``next_window``.
    """
    left = set(pending) - window.collect
    if not window.passes:
        return next_window_at_rest(left, stages, blocks_per_stage) if left else None
    if window.save is None or not (left := {block for block in left if block >= window.save}):
        return None
    return next_window(left, (window.save,), stages, blocks_per_stage)


def reachable(pending: Collection[int], boundaries: Collection[int], impassable: Collection[int]) -> set[int]:
    """The pending blocks whose hidden states can be had: no block that sequences do not get through lies before."""
    return {
        block
        for block in pending
        if not any(max(start for start in boundaries if start <= block) <= wall < block for wall in impassable)
    }


def all_windows(count: int, stages: int, blocks_per_stage: int, *, passes: bool = True) -> list[Window]:
    """The windows of an undisturbed run over ``count`` blocks, which sequences pass through or not."""
    blocks = range(count)
    window: Window | None = (
        next_window(blocks, (0,), stages, blocks_per_stage)
        if passes
        else next_window_at_rest(blocks, stages, blocks_per_stage)
    )
    windows = []
    while window is not None:
        windows.append(window)
        window = following(window, range(window.start, count), stages, blocks_per_stage)
    return windows


def even_parts(blocks: Sequence[int], parts: int) -> tuple[tuple[int, ...], ...]:
    """At most ``parts`` consecutive, non-empty parts whose lengths differ by one at most.

    The first is among the shorter ones: its stage embeds or reads besides.
    """
    parts = min(parts, len(blocks))
    bounds = [len(blocks) * part // parts for part in range(parts + 1)]
    return tuple(tuple(blocks[low:high]) for low, high in pairwise(bounds))


def batches(sequences: int, stages: int, bytes_per_sequence: int, most_bytes: int = 64 * 2**20) -> list[range]:
    """Sequences per message: enough messages to keep every stage busy, none larger than ``most_bytes``.

    How sequences are grouped changes no result, each is computed on its own.
    """
    size = max(1, min(sequences // (4 * stages), most_bytes // bytes_per_sequence))
    return [range(start, min(start + size, sequences)) for start in range(0, sequences, size)]
