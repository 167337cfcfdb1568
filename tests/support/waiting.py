"""Waiting for what another process does."""

import subprocess
import time
from collections.abc import Callable

LONGEST = 90.0  # seconds that anything is waited for


def until(
    true: Callable[[], object],
    process: subprocess.Popen[str] | None = None,
    *,
    seconds: float = LONGEST,
    every: float = 0.01,
) -> None:
    """Wait until something is true; it is a failure if `process` ends before, or so many seconds pass."""
    end = time.monotonic() + seconds
    while not true():
        assert process is None or process.poll() is None, "it ended before"
        assert time.monotonic() < end, "it did not happen"
        time.sleep(every)
