"""``python -m stages.doctor [overrides]``: does this recipe fit this machine? Fetches nothing and leaves no file."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict

from lora_fuse.machine import PLAIN, Console, painted
from lora_fuse.recipe import Artifacts, Recipe, paths
from lora_fuse.studies.doctor import ExaminedRecipe, Status, examine, table, verdict
from stages.run import run_stage


def doctor(params: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Print a line for each check, and a sentence; 1 if the recipe does not fit."""
    console.will("doctor", f"looks whether {params.name} fits this machine; nothing is fetched or written")
    findings = list(examine(recipe_of(params, at)))
    failed, sentence = any(one.status is Status.FAIL for one in findings), verdict(params.name, findings)
    if console.quiet:
        for finding in findings:
            if finding.status is not Status.OK:
                console.wrong("doctor", *table([finding]))
    elif not console.as_json:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else None
        print("\n".join(painted(line, sys.stdout) for line in table(findings, width)))
    facts = {"recipe": params.name, "fits": not failed, "findings": [asdict(finding) for finding in findings]}
    console.done("doctor", sentence, facts=facts, then=None if failed else "dvc repro")
    return int(failed)


def recipe_of(params: Recipe, at: Artifacts) -> ExaminedRecipe:
    """What of the parameters a machine has to fit."""
    loras = {name: (lora, lora.filename, params.fuse.scale_of(name)) for name, lora in params.loras.items()}
    regress, fuse = params.regress, params.fuse
    return ExaminedRecipe(
        params.name,
        params.base,
        loras,
        at.earlier_locks(),
        fuse.scale,
        cases=tuple(regress.cases),
        placement=regress.placement,
        dtype=regress.dtype,
        threads=regress.threads,
        device=fuse.device,
        untouched=fuse.untouched,
        exports=len(params.export.formats),
        publishes=params.publish.enabled,
        merged=at.merged,
        manifest=at.manifest,
        goldens=paths.GOLDEN / params.name,
    )


if __name__ == "__main__":
    run_stage(doctor, writes=False)
