"""One parser fuzzed for some seconds: what fails is kept, and tried first the next time."""

import hashlib
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.bounds import own_folder
from tests.fuzz.parsers import Parser, contents, hold, ready, signature

ROUND = 1000  # examples between two looks at the clock


@dataclass(slots=True)
class Outcome:
    """What a parser came to; `failures` counts by signature."""

    parser: str
    examples: int = 0
    read: int = 0  # of the examples, those that were no error
    seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Campaign:
    """Examples of one parser until the time is over."""

    parser: Parser
    folder: Path  # its own
    kept: Path  # the folder of failing ones
    last: FileIO  # gets each example before it is tried
    until: float  # as time.monotonic has it
    outcome: Outcome

    def run(self, number: int) -> None:
        """Examples by a seed, after those that failed before."""
        for path in sorted(self.kept.glob("*.input")):
            self._one(path.read_bytes())
        valid = self.parser.valid()
        refused = [message for content in valid if (message := self._one(content))]
        if refused:
            self.outcome.failures[f"a valid example is refused: {refused[0]}"] = len(refused)
        while time.monotonic() < self.until:
            self._round(valid, number)
            number += 1

    def _round(self, valid: Sequence[bytes], number: int) -> None:
        how = settings(
            max_examples=ROUND,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )

        @seed(number)
        @how
        @given(contents(self.parser, valid))
        def search(content: bytes) -> None:
            if time.monotonic() < self.until:
                self._one(content)

        search()

    def _one(self, content: bytes) -> str:
        """Try a content, keep it if it fails, and give the words of its refusal."""
        self.last.seek(0)
        self.last.write(content)  # stays if the process itself ends
        self.last.truncate()
        self.outcome.examples += 1
        try:
            message = hold(self.parser, self.folder, content)
            self.outcome.read += not message
            return message
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            said = signature(error)
            self.outcome.failures[said] = self.outcome.failures.get(said, 0) + 1
            if self.outcome.failures[said] == 1:
                path = self.kept / hashlib.sha256(said.encode()).hexdigest()[:12]
                path.with_suffix(".input").write_bytes(content)
                path.with_suffix(".txt").write_text("".join(traceback.format_exception(error)), errors="replace")
            return ""


def fuzz(parser: Parser, seconds: float, number: int, kept: Path) -> Outcome:
    """Fuzz a parser for so many seconds, in a folder of its own, which is the current one."""
    outcome = Outcome(parser.name)
    begun = time.monotonic()
    kept.mkdir(parents=True, exist_ok=True)
    with own_folder() as folder, (kept / "last").open("w+b", buffering=0) as last:
        ready(parser, folder)
        Campaign(parser, folder, kept, last, time.monotonic() + seconds, outcome).run(number)
    outcome.seconds = time.monotonic() - begun
    return outcome
