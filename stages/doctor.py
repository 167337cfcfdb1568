"""``python -m stages.doctor [overrides]``: does this recipe fit this machine? Fetches nothing and leaves no file."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict

from lora_fuse.machine import Console
from lora_fuse.recipe import Artifacts, Recipe, paths
from lora_fuse.studies.doctor import Status, examine, table, verdict
from stages.run import PLAIN, run_stage


def doctor(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Print a line for each check, and a sentence; 1 if the recipe does not fit."""
    console.will("doctor", f"looks whether {recipe.name} fits this machine; no file is fetched, and none stays")
    findings = list(examine(recipe, at))
    fits = all(finding.status is not Status.FAIL for finding in findings)
    if console.quiet:
        for finding in findings:
            if finding.status is not Status.OK:
                console.wrong("doctor", *table([finding]))
    elif not console.as_json:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None
        console.rows(table(findings, width))
    facts = {"recipe": recipe.name, "fits": fits, "findings": [asdict(finding) for finding in findings]}
    console.done("doctor", verdict(recipe.name, findings), facts=facts, then="dvc repro" if fits else None)
    return 0 if fits else 1


if __name__ == "__main__":
    run_stage(doctor, writes=False)
