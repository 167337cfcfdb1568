"""``python -m stages.base KEY``: pin, fetch and check a base once for all variants of it, by its key among `bases`.

The key stands for repository and revision, or the folder, so the stage is the same one whichever variants there are.
"""

from __future__ import annotations

import sys

from lora_fuse.machine import Console, OnceParser
from lora_fuse.recipe import Artifacts
from stages.config.variants import COMPILED, read_compiled, refuse_unknown
from stages.download import download
from stages.run import next_commands, parse, run


def base(key: str, console: Console) -> int:
    """Write the base's lock."""
    compiled = read_compiled()
    refuse_unknown("base", key, compiled.bases, COMPILED)
    name = compiled.bases[key]
    recipe = compiled.params(name)
    at = Artifacts.of_variant(name, recipe)
    with next_commands(at):
        return download(recipe, at, console, base_only=True)


if __name__ == "__main__":
    parser = OnceParser(prog="python -m stages.base", description="Lock a base of variants.")
    parser.add_argument("key", metavar="KEY", help="one of bases in variants/params.yaml")
    given, console = parse(parser)
    sys.exit(run("base", console, lambda: base(given.key, console)))
