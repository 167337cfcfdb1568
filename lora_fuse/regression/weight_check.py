"""The content of `verify.json`, read as what it has to be: whole, and without a contradiction."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lora_fuse.errors import BadSource, Rerun
from lora_fuse.recipe import Manifest, paths, records

AGAIN = Rerun("verify", force=True)


@dataclass(frozen=True, slots=True)
class WeightCheck:
    """The fields of `verify.json` that something depends on, see `lora_fuse.verification.Verification`.

    The last two are only shown.
    """

    passed: bool
    manifest_sha256: str
    targets: int
    rows_checked: int
    rows_total: int
    problem_count: int
    problems: list[str]
    changes: dict[str, dict[str, float | None]]
    update: dict[str, float | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_weight_check(path: Path) -> dict[str, Any]:
    """The content of `verify.json`.

    Raises:
        BadSource: it is not there, it lacks something, or what it says does not follow from what it lists.
    """
    text = paths.read_text(path, "verify")
    try:
        found = records.from_json(WeightCheck, text, str(path))
    except BadSource as error:
        raise BadSource(str(error).removesuffix("; run its stage again"), rerun=AGAIN) from error
    least = 1 if found.passed and found.targets else 0
    claims = (
        ("passed", found.passed, not found.problem_count),
        ("problem_count", found.problem_count, max(found.problem_count, len(found.problems), bool(found.problems))),
        ("rows_checked", found.rows_checked, max(least, min(found.rows_checked, found.rows_total))),
    )
    for name, said, follows in claims:
        if said != follows:
            raise _untrue(path, name, said, f"its own list gives {follows}")
    return asdict(found)


def check_manifest(path: Path, verify: dict[str, Any], manifest: Manifest, sha256: str) -> None:
    """Refuse a check that is of other weights than a manifest, by the sha256 of its text.

    Raises:
        BadSource: it is.
    """
    if verify["manifest_sha256"] != sha256:
        raise _untrue(path, "manifest_sha256", verify["manifest_sha256"], f"the manifest on disk has {sha256}")
    if verify["passed"] and verify["targets"] != manifest.targets:
        raise _untrue(path, "targets", verify["targets"], f"the manifest has {manifest.targets}")


def _untrue(path: Path, name: str, said: object, follows: str) -> BadSource:
    return BadSource(f"{path} says {name} {said}, and {follows}", rerun=AGAIN)
