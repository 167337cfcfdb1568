"""The record of a run: it lies beside the run's results and is none of them.

The same results are made elsewhere, by others, in more time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeAlias

from lora_fuse.pictures import environment
from lora_fuse.recipe import Artifacts, checkout, records

if TYPE_CHECKING:
    from lora_fuse.pictures import picture

Environment: TypeAlias = environment.Environment  # a field's name hides the module where records are parsed


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Environment and tool that rendered the pictures of a run, when it was finished (UTC, ISO 8601), what each cost.

    `costs` are by case, see `lora_fuse.pictures.cost.Cost`.
    """

    schema: int
    manifest_sha256: str
    environment: Environment
    tool: records.Tool
    finished: str
    costs: dict[str, dict[str, float | int | None]]

    @classmethod
    def of(cls, manifest_sha256: str, here: Environment, merged: Mapping[str, picture.Rendered]) -> RunRecord:
        """Record a run that has just ended, of the merged pictures by case."""
        costs = {name: asdict(one.cost) for name, one in merged.items()}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(records.SCHEMA, manifest_sha256, here, checkout.this_tool(), now, costs)


def read_run(at: Artifacts, manifest_sha256: str) -> RunRecord | None:
    """Read the record of the run that the results are of; None if they came from elsewhere."""
    if not at.run.exists():
        return None
    run = records.from_json(RunRecord, at.run.read_text(encoding="utf-8"), str(at.run))
    return run if run.manifest_sha256 == manifest_sha256 else None
