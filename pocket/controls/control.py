"""What a control is, what it leaves to judge, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_fuse.pictures import pairs, picture
from lora_fuse.regression import verdicts

if TYPE_CHECKING:
    from pocket.controls.rig import Rig

WEIGHTS, UNFUSED, GOLDEN = GATES = ("weights", "unfused", "golden")


@dataclass(frozen=True, slots=True)
class Built:
    """A merged repository and the pictures that came out of it.

    Attributes:
        folder: the repository, for the gate of the weights.
        pictures: one a case, in the order of the recipe's cases.
        same_files: whether it has the base's shards, which `verify_merge` wants; if not, its tensors are compared with
            the right merge's, bit for bit.
        references: base + LoRA unfused, where the LoRA's file is not the recipe's.
    """

    folder: Path
    pictures: Sequence[picture.Rendered]
    same_files: bool = True
    references: pairs.References | None = None


@dataclass(frozen=True, slots=True)
class Control:
    """Something that is done to the right merge or to how it is run.

    Attributes:
        name: a few words.
        what: what is done, in one line.
        build: does it, in an empty folder.
        seen_by: those of `GATES` that have to see it in float32, others may; in 16 bits any of them will do. None for a
            change that all have to let through.
        verdict: what the pictures have to come to; None leaves it open, where the weights alone have to tell.
    """

    name: str
    what: str
    build: Callable[[Rig, Path], Built]
    seen_by: tuple[str, ...] = ()
    verdict: verdicts.Verdict | None = None

    @property
    def is_fault(self) -> bool:
        """Whether it has to be caught."""
        return bool(self.seen_by)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the gates said of a control.

    Attributes:
        control: what was judged.
        same_files: see `Built`.
        problems: of the weights and of the repository's other files.
        results: of the pictures, one a case.
        beyond_golden: what separates the pictures from the goldens.
        sharp: whether the pictures are of float32.
    """

    control: Control
    same_files: bool
    problems: Sequence[str]
    results: Sequence[verdicts.CaseResult]
    beyond_golden: Sequence[str]
    sharp: bool = True

    @property
    def seen_by(self) -> tuple[str, ...]:
        """The gates that saw something wrong."""
        apart = [result for result in self.results if not result.agrees]
        said = {WEIGHTS: self.problems, UNFUSED: apart, GOLDEN: self.beyond_golden}
        return tuple(gate for gate in GATES if said[gate])

    @property
    def verdict(self) -> verdicts.Verdict:
        """That of the pictures, the worst case's; wrong weights stop a run whatever it is."""
        return verdicts.worst(result.verdict for result in self.results)

    @property
    def as_expected(self) -> bool:
        """Whether a fault was caught by the gates that have to and with its verdict; whether a change passed."""
        control = self.control
        if not control.is_fault:
            return not self.seen_by and self.verdict.passed
        if not self.sharp:
            return bool(self.seen_by)
        return set(control.seen_by) <= set(self.seen_by) and control.verdict in {None, self.verdict}

    def values(self, pair: str, metric: str) -> list[float]:
        """A metric for each case: of merged against `UNFUSED` or against `GOLDEN`."""
        compared = [result.vs_unfused if pair == UNFUSED else result.vs_golden for result in self.results]
        return [comparison.values[metric] for comparison in compared if comparison is not None]
