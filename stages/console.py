"""What a stage says: what it will do, what is wrong, and at the end what it did; all of them say it in the same way."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from lora_fuse.colour import painted


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
        print(painted(f"warning: {sentence}", sys.stderr), file=sys.stderr, flush=True)

    def wrong(self, stage: str, sentence: str) -> None:
        """Say what a check found."""
        print(f"{stage}: {painted(sentence, sys.stderr)}", file=sys.stderr, flush=True)

    def done(self, stage: str, *lines: str, facts: Mapping[str, object], then: str | None = None) -> None:
        """Say what was done.

        Args:
            stage: its name.
            lines: for a person.
            facts: for a program, JSON values by name.
            then: the command that comes next; not said where DVC runs the stage, as it goes on by itself.
        """
        if self.as_json:
            print(json.dumps({"stage": stage, **facts}), flush=True)
        elif not self.quiet:
            ending = [f"next: {then}"] if then and "DVC_STAGE" not in os.environ else []
            said = [f"{stage}: {painted(line, sys.stdout)}\n" for line in [*lines, *ending]]
            print("".join(said), end="", flush=True)

    def failed(self, stage: str, code: int, sentence: str) -> None:
        """Say to a program that the stage was refused; a person is told by `lora_fuse.cli.guarded`."""
        if self.as_json:
            print(json.dumps({"stage": stage, "code": code, "error": sentence}), flush=True)


PLAIN = Console()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command that has its own arguments know ``--quiet`` and ``--json`` as well."""
    parser.add_argument("--quiet", action="store_true", help="say only what is wrong")
    parser.add_argument("--json", action="store_true", help="say it as one JSON object")
