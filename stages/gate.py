"""Stage `gate`: decide from `verify.json` and `metrics.json`. Exit 0 passed, 1 failed, 3 nothing to compare with."""

from __future__ import annotations

import sys
from typing import Any

from stages.artifacts import METRICS, REPORT, VERIFY, read_object
from stages.config import run_stage
from stages.params import Params

NO_GOLDEN = 3


def decide(verify: dict[str, Any], metrics: dict[str, Any]) -> tuple[int, str]:
    """The exit code and a sentence that says why, and what comes next."""
    if not verify["passed"]:
        return (
            1,
            f"the merged weights are wrong ({verify['problem_count']} problems, see {VERIFY}): dvc repro -f fuse",
        )
    if verify["manifest_sha256"] != metrics["manifest_sha256"]:
        return (
            1,
            f"{VERIFY} and {METRICS} are about different merges; run both again: dvc repro -f verify regress",
        )
    if metrics["verdict"] == "no-golden":
        return NO_GOLDEN, (
            f"no approved pictures for {metrics['environment']}; look at {REPORT}, then: "
            'python -m stages.approve --reason "…"'
        )
    if not metrics["passed"]:
        return 1, (
            f"{metrics['verdict']}: look at {REPORT}. If params.yaml was changed for an experiment, "
            "`python -m stages.config` puts it back"
        )
    return 0, f"{metrics['verdict']}: merged weights verified, pictures as approved"


def gate(_: Params) -> int:
    """Print the decision; its exit code is the pipeline's."""
    code, sentence = decide(read_object(VERIFY, "verify"), read_object(METRICS, "regress"))
    print(f"gate: {sentence}", file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    run_stage(gate)
