"""Stage `gate`: decide from `verify.json` and `metrics.json`; its exit code is the pipeline's answer.

0 passed. 1 failed: wrong weights, a broken picture or a regression. 3 there is no approved picture to compare
with. 4 a person has to look: within the limits of a golden of another environment.
"""

from __future__ import annotations

from lora_fuse.machine.console import PLAIN, Console
from lora_fuse.recipe.paths import HERE, Artifacts, read_object
from lora_fuse.recipe.recipe import Recipe
from lora_fuse.regression.gate import decide
from stages.run import command, run_stage


def gate(_: Recipe, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Print the decision; its exit code is the pipeline's."""
    decision = decide(read_object(at.verify, "verify"), read_object(at.metrics, "regress"), at)
    code, sentence = decision.code, f"{decision.reason}; next: {command(decision.then, at)}"
    if code:
        console.wrong("gate", sentence)
    console.done("gate", *([] if code else [sentence]), facts={"code": code, "decision": sentence})
    return code


if __name__ == "__main__":
    run_stage(gate)
