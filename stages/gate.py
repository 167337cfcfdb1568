"""Stage `gate`: decide from `verify.json` and `metrics.json`; its exit code is the pipeline's answer.

0 passed. 1 failed: wrong weights, a broken picture or a regression. 3 there is no approved picture to compare
with. 4 a person has to look: within the limits of a golden of another environment.
"""

from __future__ import annotations

import sys
from typing import Any

from lora_fuse.regression.report import MEANINGS, next_step
from stages.artifacts import METRICS, REPORT, VERIFY, read_object
from stages.config import run_stage
from stages.params import Params

EXIT_CODES = {"exact": 0, "drift": 0, "review": 4, "no-golden": 3, "regression": 1, "invalid": 1}


def decide(verify: dict[str, Any], metrics: dict[str, Any]) -> tuple[int, str]:
    """The exit code and a sentence that says why, and the one command that comes next."""
    if not verify["passed"]:
        return (
            1,
            f"the merged weights are wrong ({verify['problem_count']} problems, see {VERIFY}); next: dvc repro -f fuse",
        )
    if verify["manifest_sha256"] != metrics["manifest_sha256"]:
        return 1, f"{VERIFY} and {METRICS} are about different merges; next: dvc repro -f verify regress"
    verdict = metrics["verdict"]
    seen = "" if metrics["passed"] else f", see {REPORT}"
    return EXIT_CODES[verdict], f"{verdict}: {MEANINGS[verdict]}{seen}; next: {next_step(metrics)}"


def gate(_: Params) -> int:
    """Print the decision; its exit code is the pipeline's."""
    code, sentence = decide(read_object(VERIFY, "verify"), read_object(METRICS, "regress"))
    print(f"gate: {sentence}", file=sys.stderr if code else sys.stdout)
    return code


if __name__ == "__main__":
    run_stage(gate)
