"""The record of a run: it lies beside the run's results and is none of them.

The same results are made elsewhere, by others, in more time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeAlias

from lora_fuse.pictures import environment
from lora_fuse.recipe import Artifacts, checkout, records

if TYPE_CHECKING:
    from lora_fuse.pictures import pairs

Environment: TypeAlias = environment.Environment  # a field's name hides the module where records are parsed


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Environment and tool that rendered the pictures of a run, when it was finished (UTC, ISO 8601), what each cost.

    `candidates_sha256` is of the text of `candidates.json`: a merge has one manifest wherever it is made, and its
    pictures differ from one kind of machine to the next. `costs` are of the merged pictures, by case, see
    `lora_fuse.pictures.render_progress.Cost`; `seconds` of every picture, by side and case, and under ``loads`` those
    of all else: of the process's start, of everything that it loaded, in that order, of all prompts, and of the rest of
    its work until this record is written.
    """

    schema: int
    candidates_sha256: str
    environment: Environment
    tool: records.Tool
    finished: str
    costs: dict[str, dict[str, float | int | None]]
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, candidates: str, here: Environment, rendered: Sequence[pairs.Pair], loads: Mapping[str, float]
    ) -> RunRecord:
        """Record a run that has just ended: the text of its candidates, its pictures, the seconds of its loads."""
        costs = {pair.case.name: asdict(pair.merged.cost) for pair in rendered}
        seconds = {"loads": dict(loads)}
        for side in ("merged", "unfused", "floor", "baseline"):
            made = {pair.case.name: getattr(pair, side) for pair in rendered}
            if found := {name: one.cost.seconds for name, one in made.items() if one is not None}:
                seconds[side] = found
        for name in rendered[0].exports:
            seconds[f"export {name}"] = {pair.case.name: pair.exports[name].cost.seconds for pair in rendered}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(records.SCHEMA, digest_of(candidates), here, checkout.this_tool(), now, costs, seconds)

    def and_took(self, more: Mapping[str, float]) -> RunRecord:
        """The same run, which spent more seconds on its results, by what."""
        loads = self.seconds.get("loads", {})
        spent = loads | {what: loads.get(what, 0.0) + seconds for what, seconds in more.items()}
        return replace(self, seconds={**self.seconds, "loads": spent})

    def is_of(self, candidates: str) -> bool:
        """True if these are the candidates of the run, by their text."""
        return self.candidates_sha256 == digest_of(candidates)


def digest_of(text: str) -> str:
    """The sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_run(at: Artifacts) -> RunRecord | None:
    """Read the record of the run that the results are of; None if they came from elsewhere."""
    if not (at.run.exists() and at.candidates.exists()):
        return None
    run = records.read(RunRecord, at.run)
    return run if run.is_of(records.read_text(at.candidates)) else None
