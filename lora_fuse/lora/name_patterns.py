"""PEFT's patterns of module names, matched within bounds: a configuration is anybody's, and a pattern may never end.

A name that is spelled out is matched by Python's `re`, which is quick at it. Any other expression goes to `regex`,
which ends a match that takes too long; what `re` does not know, or would read in another way, is refused. Pure.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from lora_fuse.errors import BadLora

Number = TypeVar("Number", int, float)
Matcher = Callable[[str, float], object]

LONGEST = 1000  # characters of a pattern
REPEATS = 1000  # the product of the counts in one, as what is repeated is copied
SECONDS = 5.0  # for all matches of a configuration; 720 names that are spelled out, of 720 modules, take 0.7
_PLAIN = re.compile(r"\^?[\w.-]*")
_COUNTS = re.compile(r"\{(\d*)(?:,(\d*))?\}")


class NamePatterns(Generic[Number]):
    """Numbers by pattern, of one configuration.

    Raises:
        ValueError: a pattern is no regular expression, or one that is too large.
    """

    def __init__(self, numbers: Mapping[str, Number] | None = None, where: str = "a configuration") -> None:
        self._where = where
        self._seconds = SECONDS
        self._matchers: list[tuple[Matcher, Number]] = [
            (_matcher(pattern), number) for pattern, number in (numbers or {}).items()
        ]

    def __bool__(self) -> bool:
        return bool(self._matchers)

    def find(self, names: Sequence[str], otherwise: Number | None) -> Number | None:
        """The number of the first pattern that is a tail of one of the names, from a dot on.

        As `peft.utils.other.get_pattern_key`.

        Raises:
            BadLora: the patterns take too long.
        """
        started = time.monotonic()
        end = started + self._seconds
        try:
            for matches, number in self._matchers:
                if any(matches(name, end) for name in names):
                    return number
                if time.monotonic() > end:
                    raise TimeoutError
        except TimeoutError as error:
            raise BadLora(
                f"{self._where}: its {len(self._matchers)} patterns take more than {SECONDS:g} s to match, at the name "
                f"{names[0]!r}; spell the names of modules out"
            ) from error
        finally:
            self._seconds -= time.monotonic() - started
        return otherwise


def is_a_name(pattern: object) -> bool:
    """True for a pattern that is a name that is spelled out, so that any engine matches it quickly."""
    return isinstance(pattern, str) and len(pattern) <= LONGEST and _PLAIN.fullmatch(pattern) is not None


def _matcher(pattern: str) -> Matcher:
    """A function of a name, and of the time at which it gives up with `TimeoutError`."""
    if len(pattern) > LONGEST:
        raise ValueError(f"the pattern {pattern[:60]!r}… has {len(pattern)} characters, at most {LONGEST} are matched")
    try:
        return _plain(pattern) if is_a_name(pattern) else _bounded(pattern)
    except (ValueError, OverflowError, RecursionError, Warning, re.error) as error:
        raise ValueError(f"the pattern {pattern!r} cannot be matched: {error}") from error


def _plain(pattern: str) -> Matcher:
    expression = re.compile(_whole(pattern))
    return lambda name, _: expression.match(name)


def _bounded(pattern: str) -> Matcher:
    import regex

    counts = [max([1, *map(int, filter(None, pair))]) for pair in _COUNTS.findall(pattern)]
    if math.prod(counts) > REPEATS:
        raise ValueError(f"it repeats a part more than {REPEATS} times")
    if "{" in _COUNTS.sub("", pattern):
        raise ValueError("it has a brace that is no count")
    with warnings.catch_warnings(action="error"):  # of what is to mean something else one day
        re.compile(_whole(pattern))
    try:
        expression = regex.compile(_whole(pattern))
    except regex.error as error:
        raise ValueError(str(error)) from error
    return lambda name, end: expression.match(name, timeout=max(end - time.monotonic(), 1e-3))


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"
