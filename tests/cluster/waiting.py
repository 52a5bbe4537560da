"""The only place of the tests where a poll interval lives."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.02
"""Between two looks at a condition: short beside every deadline asserted in the tests (>= 500 ms)."""


def wait_until(condition: Callable[[], T], deadline: float, what: str) -> T:
    """Look at `condition` until it is truthy, and return its value.

    Args:
        condition: Looked at every POLL_SECONDS; an exception counts as "not yet" and is
            shown if the deadline passes.
        deadline: Seconds from now.
        what: What is waited for, for the message.

    Raises:
        AssertionError: The deadline passed. Names `what` and the last value or exception.
    """
    end = time.monotonic() + deadline
    last: object = None
    while True:
        try:
            value = condition()
            if value:
                return value
            last = value
        except Exception as error:
            last = error
        if time.monotonic() >= end:
            raise AssertionError(f"waited {deadline} s in vain for {what}; last seen: {last!r}")
        time.sleep(POLL_SECONDS)
