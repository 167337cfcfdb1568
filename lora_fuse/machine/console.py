"""A word in colour on a terminal, and nothing of it elsewhere: https://no-color.org, and `FORCE_COLOR` against it."""

from __future__ import annotations

import os
from typing import TextIO

GOOD, DOUBTFUL, BAD = 32, 33, 31  # green, yellow, red (ECMA-48, SGR)
_KINDS = {
    GOOD: ("ok", "passed", "exact", "drift"),
    DOUBTFUL: ("warn", "warning", "review", "no-golden"),
    BAD: ("FAIL", "FAILED", "error", "regression", "invalid"),
}
_OF_WORD = {word: colour for colour, words in _KINDS.items() for word in words}


def has_colour(stream: TextIO) -> bool:
    """Whether colour is wanted on a stream."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def painted(line: str, stream: TextIO) -> str:
    """The line, its first word in the colour of a verdict if it is one."""
    word = line.split(" ", 1)[0]
    colour = _OF_WORD.get(word.rstrip(":,"))
    if colour is None or not has_colour(stream):
        return line
    return f"\x1b[1;{colour}m{word}\x1b[0m{line[len(word) :]}"
