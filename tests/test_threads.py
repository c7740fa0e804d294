"""Single threads: what is computed on them, how many there are, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from srr_dist.threads import one_thread, side_by_side
from tests.solve.problems import normal, with_threads


def test_one_thread_restores_the_count_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_items_side_by_side_come_in_order_each_on_one_thread_without_gradients():
    torch.set_grad_enabled(True)
    before, together = torch.get_num_threads(), threading.Barrier(2, timeout=60)

    def seen(item: int) -> tuple[int, int, bool]:
        together.wait()  # passes only if two are at work
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    assert list(side_by_side(seen, range(6), at_once=2)) == [(item, 1, False) for item in range(6)]
    assert torch.get_num_threads() == before
    assert torch.is_grad_enabled()


def test_threads_are_given_back_after_an_error():
    before = torch.get_num_threads()

    def fail(item: int) -> None:
        raise KeyError(item)

    with pytest.raises(KeyError, match="3"):
        list(side_by_side(fail, [3], at_once=1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("shape", [(576, 1536, 32), (24, 1100, 1100), (2048, 2048, 48)])
def test_products_with_long_sums_are_bitwise_the_same_for_any_threads(shape):
    m, k, n = shape
    A, B = normal(m, k).float(), normal(k, n, seed=1).float()
    assert torch.equal(with_threads(1, lambda: A @ B), with_threads(2, lambda: A @ B))


@pytest.mark.parametrize("given", [None, "COMPATIBLE"])
def test_a_setting_of_the_user_s_for_products_is_left_alone(given):
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    environment |= {"MKL_CBWR": given} if given else {}
    command = [sys.executable, "-c", "import os, srr_dist; print(os.environ.get('MKL_CBWR'))"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert printed == (given or ("AUTO,STRICT" if intel else "None"))
