"""Stage `gate`: decide from `verify.json` and `metrics.json`; its exit code is the pipeline's answer.

0 passed. 1 failed: wrong weights, a broken picture or a regression. 3 there is no approved picture to compare
with. 4 a person has to look: within the limits of a golden of another environment.
"""

from __future__ import annotations

from typing import Any

from lora_fuse.recipe.paths import HERE, Artifacts, read_object
from lora_fuse.recipe.recipe import Params
from lora_fuse.regression.report import MEANINGS, next_step
from stages.run import PLAIN, Console, run_stage

EXIT_CODES = {"exact": 0, "drift": 0, "review": 4, "no-golden": 3, "regression": 1, "invalid": 1}


def decide(verify: dict[str, Any], metrics: dict[str, Any], at: Artifacts = HERE) -> tuple[int, str]:
    """The exit code and a sentence that says why, and the one command that comes next."""
    code, sentence = _decide(verify, metrics, at)
    return code, at.worded(sentence)


def _decide(verify: dict[str, Any], metrics: dict[str, Any], at: Artifacts) -> tuple[int, str]:
    if not verify["passed"]:
        wrong = f"{verify['problem_count']} problems, see {at.verify}"
        return 1, f"the merged weights are wrong ({wrong}); next: dvc repro -f fuse"
    if verify["manifest_sha256"] != metrics["manifest_sha256"]:
        return 1, f"{at.verify} and {at.metrics} are about different merges; next: dvc repro -f verify regress"
    verdict = metrics["verdict"]
    seen = "" if metrics["passed"] else f", see {at.report}"
    return EXIT_CODES[verdict], f"{verdict}: {MEANINGS[verdict]}{seen}; next: {next_step(metrics)}"


def gate(_: Params, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Print the decision; its exit code is the pipeline's."""
    code, sentence = decide(read_object(at.verify, "verify"), read_object(at.metrics, "regress"), at)
    if code:
        console.wrong("gate", sentence)
    console.done("gate", *([] if code else [sentence]), facts={"code": code, "decision": sentence})
    return code


if __name__ == "__main__":
    run_stage(gate)
