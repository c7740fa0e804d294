"""Waiting out a storage server that is away for a moment: the one place where a failed request is made again."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

TOTAL_SECONDS = 120.0
"""Since its first failure, how long a request is made again. Longer than a server takes to be started anew."""

FIRST_SECONDS = 0.1
LONGEST_SECONDS = 10.0

T = TypeVar("T")
logger = logging.getLogger(__name__)


def patiently(request: Callable[[], T], transient: Callable[[Exception], bool], name: str) -> T:
    """The result of ``request``, made again after growing delays while its failures are transient.

    Delays are random, so that many who failed together do not come back together. ``name`` says in the log what failed.

    Raises:
        Exception: whatever the request raised, if that is not transient or the time is over.
    """
    deadline = None
    for attempt in count():
        try:
            return request()
        except Exception as error:
            deadline = deadline or time.monotonic() + TOTAL_SECONDS
            delay = random.uniform(0.5, 1) * min(FIRST_SECONDS * 2**attempt, LONGEST_SECONDS)
            if not transient(error) or time.monotonic() + delay > deadline:
                raise
            level = logging.WARNING if delay > 1 else logging.DEBUG
            logger.log(level, "%s: %s: %s; trying again", name, type(error).__name__, error)
            time.sleep(delay)
    raise AssertionError("unreachable")
