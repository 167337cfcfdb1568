"""Stage `goldens`: list a recipe's goldens, so that an approval for another one renders nothing of this one again."""

from __future__ import annotations

import json

from lora_fuse.machine import Console, files
from lora_fuse.recipe import Artifacts, Recipe, paths
from lora_fuse.regression import approved_list
from stages.run import PLAIN, run_stage


def goldens(recipe: Recipe, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Write `goldens.json`: the sha256 of every picture and record by its path; there may be none.

    The list beside them is left out: it says the same, and written anew it is no reason to render again.
    """
    folder = paths.GOLDEN / recipe.name
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != approved_list.LIST)
    listed = {path.relative_to(folder).as_posix(): files.hash_file(path).sha256 for path in found}
    files.replace_text(at.goldens, json.dumps(listed, indent=2) + "\n")
    console.done("goldens", f"{len(listed)} files in {folder}", facts={"files": listed})
    return 0


if __name__ == "__main__":
    run_stage(goldens)
