"""Stage `goldens`: list a recipe's goldens, so that an approval for another one renders nothing of this one again."""

from __future__ import annotations

import json

from lora_fuse.machine import Console, files
from lora_fuse.recipe import Artifacts, Recipe, paths
from lora_fuse.regression import goldens as approved
from stages.run import PLAIN, run_stage


def goldens(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Write `goldens.json`: the sha256 of every picture and record by its path; there may be none."""
    folder = paths.GOLDEN / recipe.name
    listed = approved.Goldens(folder).sums()
    files.replace_text(at.goldens, json.dumps(listed, indent=2) + "\n")
    console.done("goldens", f"{len(listed)} files in {folder}", facts={"files": listed})
    return 0


if __name__ == "__main__":
    run_stage(goldens)
