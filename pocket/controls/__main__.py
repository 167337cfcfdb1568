"""Control the gate: ``python -m pocket.controls [NAME ...]``.

Every control is built for real on the pocket model and judged by all three gates. The exit code is 1 if a fault was
missed or a benign change was refused.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lora_fuse.machine import interrupts
from lora_fuse.regression import verdicts
from pocket.controls import table
from pocket.controls.benign import BENIGN
from pocket.controls.control import Control, Outcome, judge
from pocket.controls.faults import FAULTS
from pocket.controls.rig import RECIPE, Rig

CONTROLS = {control.name: control for control in (*FAULTS, *BENIGN)}


def judge_all(controls: Sequence[Control], rules: verdicts.Rules | None = None, recipe: str = RECIPE) -> list[Outcome]:
    """Build and judge controls on a recipe of the pocket model, by its rules unless others are given; print lines."""
    outcomes = []
    with Rig(rules, recipe) as rig:
        for number, control in enumerate(controls, 1):
            begun = time.perf_counter()
            outcome = judge(rig, control)
            outcomes.append(outcome)
            seen = f"seen by {', '.join(outcome.seen_by)}" if outcome.seen_by else "passed"
            result = seen if outcome.as_expected else f"{seen}: NOT AS IT SHOULD BE"
            seconds = time.perf_counter() - begun
            print(f"{number}/{len(controls)} {control.name}: {result} ({seconds:.1f} s)", flush=True)
    return outcomes


def main(arguments: Sequence[str] | None = None, rules: verdicts.Rules | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m pocket.controls", description="control the gate")
    parser.add_argument("names", nargs="*", metavar="NAME", help="controls to make (default: all)")
    parser.add_argument("--recipe", default=RECIPE, help="of the pocket model; pocket_cuda has its pictures on a GPU")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the tables between FILE's markers")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in CONTROLS]
    if unknown:
        parser.error(f"no control is called {unknown[0]!r}; there are: {', '.join(CONTROLS)}")
    begun = time.perf_counter()
    outcomes = judge_all([CONTROLS[name] for name in options.names or CONTROLS], rules, options.recipe)
    for title, some in table.split(outcomes).items():
        if some:
            print(f"\n{table.aligned(some, title)}")
    for outcome in outcomes:
        if not outcome.as_expected:
            print(f"\n{outcome.control.name}:", *_findings(outcome), sep="\n  ")
    if options.markdown:
        table.write_markdown(options.markdown, outcomes)
    print(f"\n{time.perf_counter() - begun:.0f} s")
    print(table.summary(outcomes))
    return 0 if all(outcome.as_expected for outcome in outcomes) else 1


def _findings(outcome: Outcome) -> list[str]:
    """The gates' sentences about a control that is not as it should be."""
    pictures = [f"{result.case.name}: {reason}" for result in outcome.results for reason in result.reasons]
    return [*outcome.problems[:3], *pictures] or ["no gate saw anything"]


if __name__ == "__main__":
    sys.exit(interrupts.guarded(main))
