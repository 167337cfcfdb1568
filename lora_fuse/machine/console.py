"""The terminal: results go to stdout, all else to stderr, a line's first word in colour.

Colour: https://no-color.org, and `FORCE_COLOR` against it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TextIO

# ECMA-48, SGR
COLOURS = {
    **dict.fromkeys(("ok", "passed", "exact", "drift"), 32),  # green
    **dict.fromkeys(("warn", "warning", "review", "no-golden"), 33),  # yellow
    **dict.fromkeys(("FAIL", "FAILED", "error", "regression", "invalid"), 31),  # red
}


def painted(line: str, stream: TextIO) -> str:
    """The line, its first word in the colour of a verdict if it is one."""
    word = line.split(" ", 1)[0]
    colour = COLOURS.get(word.rstrip(":,"))
    if colour is None or not _has_colour(stream):
        return line
    return f"\x1b[1;{colour}m{word}\x1b[0m{line[len(word) :]}"


def _has_colour(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


@dataclass(frozen=True, slots=True)
class Console:
    """The output of a stage: results to stdout, all else to stderr."""

    quiet: bool = False  # warnings and problems only
    as_json: bool = False  # the result as one JSON object instead of lines
    variant: str | None = None  # the one whose stages print, under names like ``gate@VARIANT``; None for the main build
    alone: bool = True  # nothing runs the stages one after another, so that the next command is printed

    def _name(self, stage: str) -> str:
        return stage if self.variant is None else f"{stage}@{self.variant}"

    @property
    def _whose(self) -> dict[str, str]:
        return {} if self.variant is None else {"variant": self.variant}

    def will(self, stage: str, sentence: str) -> None:
        """Print what is about to be done."""
        if not self.quiet:
            print(f"{self._name(stage)}: {sentence}", file=sys.stderr, flush=True)

    def warn(self, sentence: str) -> None:
        """Print a warning of what may be a mistake."""
        print(painted(f"warning: {sentence}", sys.stderr), file=sys.stderr, flush=True)

    def wrong(self, stage: str, sentence: str) -> None:
        """Print a problem that a check found."""
        print(f"{self._name(stage)}: {painted(sentence, sys.stderr)}", file=sys.stderr, flush=True)

    def rows(self, lines: Iterable[str]) -> None:
        """Print the lines of a table, each verdict at the beginning of one in its colour."""
        print("\n".join(painted(line, sys.stdout) for line in lines))

    def done(self, stage: str, *lines: str, facts: Mapping[str, object], then: str | None = None) -> None:
        """Print what was done: `lines` for a person, `facts` for a program; `then` is the next command."""
        if self.as_json:
            print(json.dumps({"stage": stage, **self._whose, **facts}), flush=True)
        elif not self.quiet:
            ending = [f"next: {then}"] if then and self.alone else []
            text = [f"{self._name(stage)}: {painted(line, sys.stdout)}\n" for line in [*lines, *ending]]
            print("".join(text), end="", flush=True)

    def failed(self, stage: str, code: int, sentence: str) -> None:
        """Print a refusal for a program; `interrupts.guarded` prints it for a person."""
        if self.as_json:
            print(json.dumps({"stage": stage, **self._whose, "code": code, "error": sentence}), flush=True)


PLAIN = Console()
