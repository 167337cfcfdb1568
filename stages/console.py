"""What a stage says: what it will do, what is wrong, and at the end what it did; all of them say it in the same way."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Console:
    """Where a stage's words go: results to stdout, all else to stderr.

    Attributes:
        quiet: says nothing but warnings and what is wrong.
        as_json: the result is one JSON object instead of lines.
    """

    quiet: bool = False
    as_json: bool = False

    def will(self, stage: str, sentence: str) -> None:
        """Say what is about to be done."""
        if not self.quiet:
            print(f"{stage}: {sentence}", file=sys.stderr, flush=True)

    def warn(self, sentence: str) -> None:
        """Say what may be a mistake."""
        print(f"warning: {sentence}", file=sys.stderr, flush=True)

    def wrong(self, stage: str, sentence: str) -> None:
        """Say what a check found."""
        print(f"{stage}: {sentence}", file=sys.stderr, flush=True)

    def done(self, stage: str, *lines: str, facts: Mapping[str, object]) -> None:
        """Say what was done.

        Args:
            stage: its name.
            lines: for a person.
            facts: for a program, JSON values by name.
        """
        if self.as_json:
            print(json.dumps({"stage": stage, **facts}), flush=True)
        elif not self.quiet:
            print(*(f"{stage}: {line}" for line in lines), sep="\n", flush=True)


PLAIN = Console()
