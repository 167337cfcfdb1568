"""The output of a stage: results go to stdout, all else to stderr, each line by `lora_fuse.machine.text`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_fuse.machine import text


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
            text.say(f"{self._name(stage)}: {sentence}", sys.stderr)

    def warn(self, sentence: str) -> None:
        """Print a warning of what may be a mistake."""
        text.say(f"warning: {sentence}", sys.stderr)

    def wrong(self, stage: str, sentence: str) -> None:
        """Print a problem that a check found."""
        text.say(sentence, sys.stderr, before=f"{self._name(stage)}: ")

    def rows(self, lines: Iterable[str]) -> None:
        """Print the lines of a table, each verdict at the beginning of one in its colour."""
        for line in lines:
            text.say(line)

    def done(self, stage: str, *lines: str, facts: Mapping[str, object], then: str | None = None) -> None:
        """Print what was done: `lines` for a person, `facts` for a program; `then` is the next command."""
        if self.as_json:
            self._facts(stage, facts)
        elif not self.quiet:
            ending = [f"next: {then}"] if then and self.alone else []
            for line in [*lines, *ending]:
                text.say(line, before=f"{self._name(stage)}: ")

    def failed(self, stage: str, code: int, sentence: str) -> None:
        """Print a refusal for a program; `interrupts.guarded` prints it for a person."""
        if self.as_json:
            self._facts(stage, {"code": code, "error": sentence})

    def _facts(self, stage: str, facts: Mapping[str, object]) -> None:
        told = json.dumps({"stage": stage, **self._whose, **facts})  # in ASCII, of which JSON leaves one control
        text.say(told.replace("\x7f", "\\u007f"))
