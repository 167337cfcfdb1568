"""What is said on a terminal, in one way: results to stdout, all else to stderr, a word of it in colour.

Colour: https://no-color.org, and `FORCE_COLOR` against it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Console:
    """Where a stage's words go: results to stdout, all else to stderr.

    Attributes:
        quiet: says nothing but warnings and what is wrong.
        as_json: the result is one JSON object instead of lines.
        variant: whose stages speak, which are called ``gate@VARIANT``; None for the main build.
        alone: nothing that runs the stages one after another is around, so the command that comes next is said.
    """

    quiet: bool = False
    as_json: bool = False
    variant: str | None = None
    alone: bool = True

    def _name(self, stage: str) -> str:
        return stage if self.variant is None else f"{stage}@{self.variant}"

    @property
    def _whose(self) -> dict[str, str]:
        return {} if self.variant is None else {"variant": self.variant}

    def will(self, stage: str, sentence: str) -> None:
        """Say what is about to be done."""
        if not self.quiet:
            print(f"{self._name(stage)}: {sentence}", file=sys.stderr, flush=True)

    def warn(self, sentence: str) -> None:
        """Say what may be a mistake."""
        print(painted(f"warning: {sentence}", sys.stderr), file=sys.stderr, flush=True)

    def wrong(self, stage: str, sentence: str) -> None:
        """Say what a check found."""
        print(f"{self._name(stage)}: {painted(sentence, sys.stderr)}", file=sys.stderr, flush=True)

    def done(self, stage: str, *lines: str, facts: Mapping[str, object], then: str | None = None) -> None:
        """Say what was done.

        Args:
            stage: its name.
            lines: for a person.
            facts: for a program, JSON values by name.
            then: the command that comes next; said where the stage runs alone.
        """
        if self.as_json:
            print(json.dumps({"stage": stage, **self._whose, **facts}), flush=True)
        elif not self.quiet:
            ending = [f"next: {then}"] if then and self.alone else []
            said = [f"{self._name(stage)}: {painted(line, sys.stdout)}\n" for line in [*lines, *ending]]
            print("".join(said), end="", flush=True)

    def failed(self, stage: str, code: int, sentence: str) -> None:
        """Say to a program that the stage was refused; a person is told by `interrupts.guarded`."""
        if self.as_json:
            print(json.dumps({"stage": stage, **self._whose, "code": code, "error": sentence}), flush=True)


PLAIN = Console()
