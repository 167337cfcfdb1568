"""The result of a check, and its text. Pure."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """The meaning of a finding for the build: nothing, something to know, or that it will not run."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check."""

    name: str  # the thing that was checked, in a word or two
    status: Status  # its meaning for the build
    found: str  # the state of the machine
    needed: str = ""  # the recipe's need; empty if that goes without saying
    remedy: str = ""  # the way out, of a finding that is not ok

    @property
    def text(self) -> str:
        """All of it but name and status, as a line."""
        needed = f"needs {self.needed}" if self.needed else ""
        return "; ".join(filter(None, (self.found, needed, self.remedy)))


def ok(name: str, found: str, needed: str = "") -> Finding:
    """Nothing wrong."""
    return Finding(name, Status.OK, found, needed)


def warn(name: str, found: str, needed: str = "", remedy: str = "") -> Finding:
    """Something to know."""
    return Finding(name, Status.WARN, found, needed, remedy)


def fail(name: str, found: str, needed: str = "", remedy: str = "") -> Finding:
    """The build will not run."""
    return Finding(name, Status.FAIL, found, needed, remedy)


def table(findings: Sequence[Finding], width: int | None = None) -> list[str]:
    """A line for each finding, its columns aligned; with `width`, wrapped to so many characters below its column."""
    longest = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        head = f"{finding.status:<4}  {finding.name:<{longest}}  "
        fits = sys.maxsize if width is None else max(width, len(head) + 20)
        lines.append(textwrap.fill(finding.text, fits, initial_indent=head, subsequent_indent=" " * len(head)))
    return lines


def verdict(recipe: str, findings: Sequence[Finding]) -> str:
    """The answer in a sentence."""
    failed = [finding.name for finding in findings if finding.status is Status.FAIL]
    warned = [finding.name for finding in findings if finding.status is Status.WARN]
    if failed:
        return f"FAIL: {recipe} will not build here: {', '.join(failed)}"
    return f"ok: {recipe} fits this machine" + (f"; look at: {', '.join(warned)}" if warned else "")
