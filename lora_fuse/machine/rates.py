"""How fast work went on this machine, kept between runs so that the next can say how long it will take.

The file is in the user's cache (`XDG_CACHE_HOME`, else ``~/.cache``), and nothing but what is said depends on it.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from lora_fuse.machine.files import replace_text

SHORTEST = 2.0  # seconds: a shorter run measures the start, not the rate


def rates_file() -> Path:
    """Where the rates are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lora-fuse", "rates.json").expanduser()


def rate(work: str) -> float | None:
    """Units per second of the last run of such work; None if there was none."""
    found = _rates().get(work)
    return found if isinstance(found, float) and found > 0 else None


def remember(work: str, amount: float, seconds: float) -> None:
    """Keep a rate for the next run, if the work was long enough to have one; a cache that cannot be written is none."""
    if seconds >= SHORTEST and amount > 0:
        with suppress(OSError):
            replace_text(rates_file(), json.dumps(_rates() | {work: amount / seconds}, indent=2) + "\n")


def _rates() -> dict[str, object]:
    try:
        found = json.loads(rates_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
