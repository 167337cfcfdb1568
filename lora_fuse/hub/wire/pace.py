"""The pace of a transfer: bytes that come too slowly are as good as none. Pure but for the clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

LEAST = 1000.0  # bytes a second: a telephone's modem had five times that, and 60 GB would take two years
TOO_SLOW = f"less than {LEAST / 1000:g} kB/s moved for"  # so many seconds


@dataclass(slots=True)
class Pace:
    """Bytes since the last moment at which a transfer was known to be under way.

    It is while `LEAST` bytes a second move, on average over `seconds`, or something is finished (`restart`).
    """

    seconds: float  # that it may be too slow for
    _bytes: float = 0
    _since: float = field(default_factory=time.monotonic)

    def add(self, count: float) -> None:
        """Count bytes that moved."""
        self._bytes += max(count, 0)
        if self._bytes >= LEAST * self.seconds:
            self.restart()

    def restart(self) -> None:
        """Begin anew, since something was finished."""
        self._bytes = 0
        self._since = time.monotonic()

    @property
    def quiet(self) -> float:
        """Seconds since the last such moment."""
        return time.monotonic() - self._since
