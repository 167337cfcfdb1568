"""Rendered pairs judged case by case: with each other, with their noise floor and with the goldens."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_fuse.pictures import pairs
from lora_fuse.regression.verdicts import CaseResult, Golden, Rules, Subject, examine


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """A pair and what it came to."""

    pair: pairs.Pair
    result: CaseResult

    @property
    def name(self) -> str:
        """The case's name."""
        return self.pair.case.name


def judge_pairs(pairs: Sequence[pairs.Pair], goldens: Mapping[str, Sequence[Golden]], rules: Rules) -> list[JudgedPair]:
    """Compare every pair with each other, with its noise floor and with the goldens of its case.

    Args:
        pairs: what was rendered.
        goldens: approved pictures by case, see `lora_fuse.regression.goldens.Goldens`.
        rules: what the cases are held to.
    """
    judged = []
    for pair in pairs:
        case = pair.case
        size = (case.width, case.height) if case.width and case.height else None
        subject = Subject(case.name, case.prompt, case.seed, size)
        judged.append(
            JudgedPair(pair, examine(subject, pair.merged, pair.unfused, goldens.get(case.name, ()), rules, pair.floor))
        )
    return judged


def save_pictures(judged: Sequence[JudgedPair], folder: Path) -> None:
    """Write ``CASE.merged.png``, ``CASE.unfused.png`` and so on, lossless; an approval copies the first.

    What an earlier run left in `folder` goes, but only now that there is something to put in its place.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for case in judged:
        sides = {"merged": case.pair.merged, "unfused": case.pair.unfused, "baseline": case.pair.baseline}
        for side, rendered in sides.items():
            if rendered is not None:
                (folder / f"{case.name}.{side}.png").write_bytes(rendered.png)
