"""Progress of long work on stderr: a bar with bytes per second on a terminal, a plain line now and then elsewhere.

How fast work went is kept between runs, so that the next can say how long it will take: in the user's cache
(`XDG_CACHE_HOME`, else ``~/.cache``), and nothing but what is said depends on it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from tqdm import tqdm

from lora_fuse.machine import text
from lora_fuse.machine.files import read_json, replace_text

EVERY = 10.0  # seconds between plain lines
SHORTEST = 2.0  # seconds: a shorter run measures the start, not the rate
FEW = 1 << 26  # bytes that take a blink: their rate is that of the start

_silent: ContextVar[bool] = ContextVar("silent", default=False)


def human_bytes(count: float) -> str:
    """A number of bytes as people read it, in powers of 1000: ``57.0GB``."""
    return str(tqdm.format_sizeof(count, "B", 1000))


def human_seconds(seconds: float) -> str:
    """A duration as people say it: ``0.4 s``, ``45 s``, ``3 min``, ``1 h 20 min``."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def human_rate(count: float, seconds: float) -> str:
    """Bytes and how fast they went: ``8.9GB in 45 s (198MB/s)``."""
    return f"{human_bytes(count)} in {human_seconds(seconds)} ({human_bytes(count / max(seconds, 1e-3))}/s)"


def estimate(work: str, count: float, *, in_bytes: bool = True) -> str:
    """Estimate the duration of some work, as the end of a sentence; empty if nothing like it was measured here yet."""
    per_second = rate(work)
    if per_second is None or count / per_second < 1:
        return ""
    speed = f" at {human_bytes(per_second)}/s" if in_bytes else ""
    return f"; about {human_seconds(count / per_second)}{speed}, as the last time"


def process_age() -> float:
    """Seconds since this process was started, its own start with them; 0 where the system does not say (not Linux)."""
    with suppress(OSError):
        after_name = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")  # proc_pid_stat(5): field 22, since boot
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return 0.0


class Stopwatch:
    """A clock that starts when it is made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._start


@contextmanager
def silence() -> Iterator[None]:
    """Suppress progress bars and lines; warnings and errors are no progress."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def is_silent() -> bool:
    """True within `silence`."""
    return _silent.get()


def log(line: str) -> None:
    """Print a line to stderr that is good to know and nothing more."""
    if not is_silent():
        text.say(line, sys.stderr)


@contextmanager
def byte_progress(label: str, total: int, *, at_least: int = 0) -> Iterator[Callable[[int], None]]:
    """Show progress towards `total` bytes, if they are `at_least` so many, and remember their rate under the label.

    Yields:
        The function to call with the bytes just done, from any thread.
    """
    clock = Stopwatch()
    if is_silent() or total < at_least:
        yield lambda _: None
    elif sys.stderr.isatty():
        with bar(label, total, unit="B", unit_scale=True) as shown:
            lock = threading.Lock()

            def add(count: int) -> None:
                with lock:
                    shown.update(count)

            yield add
    else:
        yield _Lines(label, total).add
    if total >= FEW:
        remember(label, total, clock.seconds)


def bar(label: str, total: float, **how: object) -> tqdm[None]:
    """A bar on stderr as wide as the terminal, which goes when it is done: a summary follows."""
    return tqdm(total=total, desc=text.line(label), file=sys.stderr, dynamic_ncols=True, leave=False, **how)  # type: ignore[call-overload, no-any-return]


class Tally:
    """A count of bytes from any thread, which begins before there is anything to show."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._advance: Callable[[int], None] = lambda _: None

    def add(self, count: int) -> None:
        """Count some more bytes."""
        with self._lock:
            self._count += count
            self._advance(count)

    @contextmanager
    def shown(self, label: str, total: int, *, at_least: int = 0) -> Iterator[None]:
        """Show progress towards what is left of `total` bytes by now, see `byte_progress`."""
        done = self._count
        with byte_progress(label, max(0, total - done), at_least=at_least) as advance:
            with self._lock:
                advance(self._count - done)
                self._advance = advance
            yield


class _Lines:
    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._start = self._shown = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._shown >= EVERY:
                self._shown = now
                log(self._line(now - self._start))

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        done = f"{human_bytes(self._done)} of {human_bytes(self._total)}"
        line = f"{self._label}: {done}, {human_seconds(seconds)}, {human_bytes(rate)}/s"
        if not 0 < self._done < self._total:
            return line
        return f"{line}, about {human_seconds((self._total - self._done) / rate)} left"


def rates_file() -> Path:
    """The path of the file with the rates."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lora-fuse", "rates.json").expanduser()


def rate(work: str) -> float | None:
    """Units per second of the last run of such work; None if there was none."""
    per_second = _rates().get(work)
    return per_second if isinstance(per_second, float) and per_second > 0 else None


def remember(work: str, amount: float, seconds: float) -> None:
    """Keep a rate for the next run, if the work was long enough to have one; a cache that cannot be written is none."""
    if seconds >= SHORTEST and amount > 0:
        with suppress(OSError, RuntimeError):  # nor is there one for a user without a home
            replace_text(rates_file(), json.dumps(_rates() | {work: amount / seconds}, indent=2) + "\n")


def _rates() -> dict[str, object]:
    try:
        return read_json(rates_file(), dict, OSError)
    except (OSError, RuntimeError):
        return {}
