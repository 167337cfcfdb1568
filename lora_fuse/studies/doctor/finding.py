"""What a check found, and how it is shown. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """What a finding means for the build: nothing, something to know, or that it will not run."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check.

    Attributes:
        name: what was looked at, in a word or two.
        status: what it means.
        found: what is there.
        needed: what the recipe needs; empty if that goes without saying.
        remedy: the way out, of a finding that is not ok.
    """

    name: str
    status: Status
    found: str
    needed: str = ""
    remedy: str = ""

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
    """It will not run."""
    return Finding(name, Status.FAIL, found, needed, remedy)


def table(findings: Sequence[Finding], width: int | None = None) -> list[str]:
    """A line for each finding, its columns aligned; with `width`, wrapped to so many characters below its column."""
    longest = max((len(one.name) for one in findings), default=0)
    lines = []
    for one in findings:
        head = f"{one.status:<4}  {one.name:<{longest}}  "
        if width is None:
            lines.append(head + one.text)
        else:
            after = " " * len(head)
            lines.append(
                textwrap.fill(one.text, max(width, len(head) + 20), initial_indent=head, subsequent_indent=after)
            )
    return lines


def verdict(recipe: str, findings: Sequence[Finding]) -> str:
    """A sentence."""
    failed = [one.name for one in findings if one.status is Status.FAIL]
    warned = [one.name for one in findings if one.status is Status.WARN]
    if failed:
        return f"FAIL: {recipe} will not build here: {', '.join(failed)}"
    return f"ok: {recipe} fits this machine" + (f"; look at: {', '.join(warned)}" if warned else "")
