"""``python -m stages.config [overrides]``: compile `conf/` to `params.yaml` and `variants/params.yaml`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from lora_fuse.errors import CheckFailed
from lora_fuse.machine import files, interrupts, text
from lora_fuse.recipe import Recipe
from stages.config import PARAMS
from stages.config.composition import compose
from stages.config.variants import COMPILED, compile_entries


def main(arguments: Sequence[str]) -> int:
    """Write params.yaml and variants/params.yaml, or compare them (``--check``)."""
    overrides = [argument for argument in arguments if argument != "--check"]
    tree = compose(overrides)
    Recipe.parse(tree, " ".join(overrides) or "conf/")
    variants = compile_entries()
    wanted = {PARAMS: tree, COMPILED: variants}
    texts = {
        path: yaml.safe_dump(content, sort_keys=True, allow_unicode=True, width=110) for path, content in wanted.items()
    }
    if "--check" in arguments:
        for path, yaml_text in texts.items():
            _check(path, yaml_text)
        return 0
    for path, yaml_text in texts.items():
        files.replace_text(path, yaml_text)
    text.say(f"{PARAMS} written: recipe {tree['name']}")
    text.say(f"{COMPILED} written: {', '.join(variants['variants']) or 'no variants'}")
    return 0


def _check(path: Path, wanted: str) -> None:
    try:
        there = files.read_text(path) if path.exists() else ""
        same = files.parse_yaml(there) == files.parse_yaml(wanted)
    except (OSError, ValueError) as error:
        raise CheckFailed(f"{path} is not YAML ({error}); write it anew: python -m stages.config") from error
    if same:
        text.say(f"{path} is what conf/ composes to")
        return
    diff = difflib.unified_diff(there.splitlines(), wanted.splitlines(), str(path), "conf/", lineterm="", n=0)
    for line in diff:
        text.say(line)
    raise CheckFailed(f"{path} is not what conf/ composes to; write it anew: python -m stages.config")


if __name__ == "__main__":
    sys.exit(interrupts.guarded(lambda: main(sys.argv[1:])))
