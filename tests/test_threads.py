"""Single threads: what is computed on them, how many there are, and what they leave behind."""

from __future__ import annotations

import threading

import pytest
import torch

from srr_dist.threads import one_thread, side_by_side


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
