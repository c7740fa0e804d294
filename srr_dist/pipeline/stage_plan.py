"""What each stage is told of a window."""

from __future__ import annotations

from dataclasses import dataclass

from srr_dist.pipeline.windows import Window


@dataclass(frozen=True)
class StagePlan:
    """What a stage does in one window."""

    stage: int
    window: int
    blocks: tuple[int, ...]
    collect: frozenset[int]
    """Blocks that the window is for; the others only pass hidden states on, and gradients back."""
    start: int | None
    """On the first stage: the block whose boundary the sequences are read from, 0 for the tokens."""
    save: int | None
    """On the last stage: the block before which the outgoing hidden states are stored, None to let them go."""
    last: bool
    """Whether the window ends with this stage."""
    planned_memory: dict[str, int]
    passes: bool = True
    """Whether sequences pass; if not, moments are taken from the statistics."""
    then: str = "solve"
    """What follows once they have passed, as in ``Window``."""
    save_gradients: int | None = None
    """On the first stage: the block before which the gradients that come back are stored, None to let them go."""
    ahead: tuple[int, ...] = ()
    """Blocks that this stage will hold next if all goes well; a guess, so that their weights can be read early."""

    @property
    def passed(self) -> tuple[int, ...]:
        """Blocks that sequences pass forward, none where they turn round: those are run when gradients come."""
        return () if self.last and self.then == "back" else self.blocks


def stage_plans(
    window: Window, number: int, planned_memory: dict[str, int], ahead: Window | None = None
) -> list[StagePlan]:
    """What each stage is told of a window, and of the one that may follow."""
    later = ahead.stages if ahead is not None else ()
    last = len(window.stages) - 1
    return [
        StagePlan(
            stage=index,
            window=number,
            blocks=blocks,
            collect=window.collect & frozenset(blocks),
            start=window.start if index == 0 and window.passes else None,
            save=window.save if index == last and window.then != "back" else None,
            last=index == last,
            planned_memory=planned_memory,
            passes=window.passes,
            then=window.then,
            save_gradients=window.save if index == 0 and window.then == "back" else None,
            ahead=later[index] if index < len(later) else (),
        )
        for index, blocks in enumerate(window.stages)
    ]
