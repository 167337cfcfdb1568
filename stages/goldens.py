"""Stage `goldens`: list a recipe's goldens, so that an approval for another one renders nothing of this one again."""

from __future__ import annotations

import json

from lora_fuse.machine.console import PLAIN, Console
from lora_fuse.machine.files import hash_file, replace_text
from lora_fuse.recipe.paths import GOLDEN, HERE, Artifacts
from lora_fuse.recipe.recipe import Recipe
from stages.run import run_stage


def goldens(params: Recipe, at: Artifacts = HERE, console: Console = PLAIN) -> int:
    """Write `goldens.json`: the sha256 of every picture and record by its path; there may be none."""
    folder = GOLDEN / params.name
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {path.relative_to(folder).as_posix(): hash_file(path).sha256 for path in files}
    replace_text(at.goldens, json.dumps(listed, indent=2) + "\n")
    console.done("goldens", f"{len(listed)} files in {folder}", facts={"files": listed})
    return 0


if __name__ == "__main__":
    run_stage(goldens)
