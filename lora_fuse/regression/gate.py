"""The gate's decision, from what `verify` and `regress` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_fuse.errors import Rerun
from lora_fuse.recipe import Artifacts, paths
from lora_fuse.regression.report import MEANINGS, next_step

EXIT_CODES = {"exact": 0, "drift": 0, "review": 4, "no-golden": 3, "regression": 1, "invalid": 1}


@dataclass(frozen=True, slots=True)
class Decision:
    """The pipeline's exit code, a sentence that says why, and the step that comes next."""

    code: int
    reason: str
    then: Rerun


def decide(verify: dict[str, Any], metrics: dict[str, Any], at: Artifacts = paths.HERE) -> Decision:
    """Decide from the contents of `verify.json` and `metrics.json`."""
    if not verify["passed"]:
        wrong = f"{verify['problem_count']} problems, see {at.verify}"
        return Decision(1, f"the merged weights are wrong ({wrong})", Rerun("fuse", force=True))
    if verify["manifest_sha256"] != metrics["manifest_sha256"]:
        again = Rerun("verify regress", force=True)
        return Decision(1, f"{at.verify} and {at.metrics} are about different merges", again)
    verdict = metrics["verdict"]
    seen = "" if metrics["passed"] else f", see {at.report}"
    return Decision(EXIT_CODES[verdict], f"{verdict}: {MEANINGS[verdict]}{seen}", next_step(metrics))
