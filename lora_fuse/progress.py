"""Progress of long work: a bar with bytes per second on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

EVERY = 10.0  # seconds between plain lines


def human_bytes(count: float) -> str:
    """A number of bytes as people read it, in powers of 1000: ``57.0GB``."""
    return str(tqdm.format_sizeof(count, "B", 1000))


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress on stderr towards `total` bytes.

    Yields:
        The function to call with the bytes just done, from any thread.
    """
    if sys.stderr.isatty():
        with tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr) as bar:
            lock = threading.Lock()

            def add(count: int) -> None:
                with lock:
                    bar.update(count)

            yield add
        return
    lines = _Lines(label, total)
    yield lines.add
    lines.finish()


class _Lines:
    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._start = self._shown = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._shown >= EVERY:
                self._shown = now
                self._print(now)

    def finish(self) -> None:
        self._print(time.monotonic())

    def _print(self, now: float) -> None:
        seconds = max(now - self._start, 1e-3)
        print(
            f"{self._label}: {human_bytes(self._done)} of {human_bytes(self._total)}, {seconds:.1f} s, "
            f"{human_bytes(self._done / seconds)}/s",
            file=sys.stderr,
            flush=True,
        )
