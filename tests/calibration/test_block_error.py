"""The error of a block's output and its gradient, against float64 autograd on the whole expression."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from srr_dist.calibration.block_error import OutputError

D, WIDE, TOKENS, SEQUENCES = 16, 40, 12, 6


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, WIDE), nn.Linear(WIDE, D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.up(x)))


def parts() -> tuple[Block, list[torch.Tensor], list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    block = Block()
    inputs = [torch.randn(1, TOKENS, D) for _ in range(SEQUENCES)]
    inputs[0][0, 0] *= 1000.0  # a massive token
    with torch.no_grad():
        targets = [block(x) for x in inputs]
    weights = {"up": torch.randn(WIDE, D) / 4, "down": torch.randn(D, WIDE) / 6}
    return block, inputs, targets, weights


def output_error(threads: int = 1, first: int = 1) -> tuple[OutputError, dict[str, torch.Tensor]]:
    block, inputs, targets, weights = parts()
    linears = {"up": block.up, "down": block.down}
    return OutputError(block, linears, inputs.__getitem__, targets.__getitem__, threads, first), weights


def reference(sequences: list[int], first: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    block, inputs, targets, weights = parts()
    block.double()
    block.up.weight.data, block.down.weight.data = weights["up"].double(), weights["down"].double()
    x, y = torch.cat([inputs[i] for i in sequences]).double(), torch.cat([targets[i] for i in sequences]).double()
    counts = torch.ones(x.shape[:2], dtype=torch.float64)
    counts[:, 0] = first
    loss = ((block(x) - y).square().sum(-1) / y.square().sum(-1) * counts).sum() / counts.sum()
    return loss.detach(), torch.autograd.grad(loss, [block.up.weight, block.down.weight])


@pytest.mark.parametrize("first", [1, 32])
@pytest.mark.parametrize("sequences", [[0], [1, 2, 3], [5, 0, 4, 2]], ids=str)
def test_value_and_gradients_are_those_of_float64(sequences, first):
    error, weights = output_error(first=first)
    loss, slopes = reference(sequences, first)
    assert error.value(weights, sequences) == pytest.approx(float(loss), rel=1e-5)
    found = error.gradients(weights, sequences)
    for slope, name in zip(slopes, ("up", "down"), strict=True):
        assert float((found[name].double() - slope).norm() / slope.norm()) < 1e-5


def test_original_weights_have_no_error():
    block, inputs, targets, _ = parts()
    error = OutputError(block, {"up": block.up}, inputs.__getitem__, targets.__getitem__)
    assert error.value({"up": block.up.weight.detach().clone()}, [0, 1, 2]) == 0.0


def test_bits_do_not_depend_on_threads():
    results = []
    for threads in (1, 2, 3):
        error, weights = output_error(threads)
        results.append((error.value(weights, range(SEQUENCES)), error.gradients(weights, range(SEQUENCES))))
    for value, slopes in results[1:]:
        assert value == results[0][0]
        assert all(torch.equal(slopes[name], results[0][1][name]) for name in slopes)
