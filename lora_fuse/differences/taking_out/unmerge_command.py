"""The command ``unmerge``: LoRAs taken out of a merge, and how many elements rounding has made uncertain."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fuse.machine import text

if TYPE_CHECKING:
    from lora_fuse.lora import LoraInput, Selection

FEWEST = 10  # elements that would show that a LoRA is not there, for an answer to rely on


def add_unmerge(commands: Any) -> argparse.ArgumentParser:
    """Add the command to a parser's; options that say what was merged, and `run_unmerge`, are for the caller to add."""
    unmerge: argparse.ArgumentParser = commands.add_parser(
        "unmerge", help="take LoRAs out of a merge: write its base, as far as rounding left it"
    )
    unmerge.add_argument("checkpoint", type=Path, metavar="CKPT")
    unmerge.add_argument("out", metavar="OUT")
    unmerge.add_argument(
        "--rounding",
        choices=("once", "twice", "thrice"),
        default="once",
        help="in the merge: once (default), or as PEFT and diffusers do in 16 bits, on a CPU: twice, a GPU: thrice",
    )
    unmerge.add_argument(
        "--base-like", type=Path, metavar="FOLDER", help="names, shapes and dtypes that OUT has to have"
    )
    unmerge.add_argument("--replace", action="store_true", help="replace OUT even if lora-fuse did not make it")
    unmerge.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    return unmerge


def run_unmerge(options: argparse.Namespace, loras: Sequence[LoraInput], selection: Selection) -> int:
    """Run the command, and print what it made."""
    from lora_fuse.differences.taking_out.unmerging import unmerge

    made = unmerge(
        options.checkpoint,
        loras,
        Path(options.out),
        rounding=options.rounding,
        selection=selection,
        base_like=options.base_like,
        replace=options.replace,
        show_progress=not options.json,
    )
    counts = made.manifest.unmerged
    if counts is None:
        raise RuntimeError("a plan that is undone counts")
    if counts.telling < FEWEST:
        text.say(
            f"warning: of a checkpoint without these LoRAs {counts.telling:.2g} elements would show it, which is too "
            f"few to tell whether {options.checkpoint} has them",
            sys.stderr,
        )
    if options.json:
        said = {"out": options.out, **asdict(counts), "files": {n: asdict(f) for n, f in made.manifest.files.items()}}
        text.say(json.dumps(said, sort_keys=True))
        return 0
    share = counts.uncertain / counts.elements
    text.say(
        f"unmerged: {options.out}, {counts.elements} elements of {made.manifest.targets} weights: {counts.certain} are "
        f"the base's, {counts.uncertain} ({share:.3%}) cannot be told and are off by at most {counts.largest_error:.3g}"
    )
    shown = f"{counts.impossible} cannot be a sum with these LoRAs, of about {counts.telling:.0f} without them"
    also = ": an element may be off by one step where the merge was rounded otherwise" if counts.impossible else ""
    text.say(f"  {shown}{also}")
    for name, file in made.manifest.files.items():
        if file.origin == "fused":
            text.say(f"  {file.sha256}  {name}")
    if made.sharing:
        text.say(made.sharing)
    return 0
