"""Stage `gate`: decide on `verify.json` and `metrics.json`; its exit code is the pipeline's answer.

Their verdicts are worked out again from their numbers, the pictures and the records (`regression/consistency.py`); what
says something else than follows is refused, 2.

0 passed. 1 failed: wrong weights, a broken picture or a regression. 3 there is no approved picture to compare
with. 4 a person has to look: within the limits of a golden of another environment.
"""

from __future__ import annotations

from lora_fuse.machine import Console
from lora_fuse.recipe import Artifacts, Recipe, paths
from lora_fuse.regression import gate as decisions
from stages.run import PLAIN, command, run_stage


def gate(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Print the decision; its exit code is the pipeline's."""
    decision = decisions.decide(recipe, at)
    sentence = f"{decision.reason}; next: {command(decision.then, at)}"
    facts = {"code": decision.code, "decision": sentence}
    if decision.code:
        console.wrong("gate", sentence)
        console.done("gate", facts=facts)
    else:
        console.done("gate", sentence, facts=facts)
    return decision.code


if __name__ == "__main__":
    run_stage(gate)
