"""The command ``explain``: its options, and the answer on a terminal, as JSON and as a page."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fuse.errors import BadConfig, naming_extras
from lora_fuse.machine import files, text

if TYPE_CHECKING:
    from lora_fuse.differences.explaining.explanation import Explanation

SHOWN = 12  # blocks that are listed


def add_explain(commands: Any) -> None:
    """Add the command to a parser's."""
    explain: argparse.ArgumentParser = commands.add_parser(
        "explain", help="what is in a checkpoint: which of some LoRAs, at what scale, and what else"
    )
    explain.add_argument(
        "checkpoint",
        type=text.place,
        metavar="CKPT",
        help="pipeline, component or file; hf://OWNER/NAME@COMMIT: a pipeline on the Hub, read there",
    )
    explain.add_argument(
        "--base", type=text.place, required=True, metavar="BASE", help="what it may have come from, as CKPT"
    )
    explain.add_argument("--lora", type=Path, action="append", default=[], metavar="F", help="may be in it; repeat")
    explain.add_argument(
        "--component",
        action="append",
        default=[],
        metavar="NAME",
        help="the component that each --lora is for, once for each; auto: as its keys say (default)",
    )
    explain.add_argument(
        "--rows", default="all", metavar="N|all", help="rows of each weight to compare (default all); scales: as ever"
    )
    explain.add_argument(
        "--leave-out", action="append", default=[], metavar="P", help="pattern of a LoRA's keys without a module"
    )
    explain.add_argument("--html", type=Path, metavar="FILE", help="write a page, with a plot per block")
    explain.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    explain.set_defaults(run=_explain)


def _explain(options: argparse.Namespace) -> int:
    from lora_fuse.differences import opened
    from lora_fuse.differences.explaining.explanation import explain

    if options.rows != "all" and not (options.rows.isdecimal() and int(options.rows) > 0):
        raise BadConfig(f"--rows is {options.rows!r}; give a number of rows, or all")
    if options.html is not None and options.html.is_dir():
        raise BadConfig(f"--html {options.html} is a folder; name the file to write, {options.html / 'explain.html'}")
    if len(options.component) not in (0, len(options.lora)):
        raise BadConfig(
            f"{len(options.lora)} --lora and {len(options.component)} --component: give one for each --lora, or none"
        )
    with opened(options.checkpoint, options.base) as (checkpoint, base):
        explained = explain(
            checkpoint,
            base,
            options.lora,
            components=[None if name == "auto" else name for name in options.component],
            rows=None if options.rows == "all" else int(options.rows),
            leave_out=options.leave_out,
            show_progress=not options.json,
        )
    if options.html is not None:
        from lora_fuse.differences.explaining.explain_page import explain_html

        with naming_extras("a page of the explanation"):
            page = explain_html(explained)
        files.replace_text(options.html, page)
    if options.json:
        text.say(json.dumps(answer(explained), sort_keys=True))
        return 0
    _print(explained)
    return 0


def _print(explained: Explanation) -> None:
    from lora_fuse.differences.explaining.explain_verdict import of_lora, verdict

    text.say(f"explain: {verdict(explained)}")
    for lora in explained.loras:
        text.say(f"  {of_lora(lora, explained)}")
    count = len(explained.tensors)
    text.say(f"  {explained.differing} of {count} weights differ" + (", by block:" if explained.differing else ""))
    changed = [one for one in explained.blocks if one.differing]
    for one in changed[:SHOWN]:
        left = f", left {one.left:.3g}" if one.unexplained else ""
        rank = f" of rank {one.rest.rank}" if one.rest is not None and one.rest.rank else ""
        text.say(f"    block {one.block}: difference {one.relative:.3g} of the weights{left}{rank}")
    if len(changed) > SHOWN:
        text.say(f"    and {len(changed) - SHOWN} blocks more")
    for side, names in (("BASE", explained.pair.only_base), ("CKPT", explained.pair.only_other)):
        if names:
            text.say(f"  {len(names)} tensors are in {side} alone, first {names[0]}")
    if explained.header is not None:
        text.say(f"  CKPT's header says, which is not relied on: {explained.header}")


def answer(explained: Explanation) -> dict[str, Any]:
    """The explanation as JSON has it: no infinite numbers."""
    from lora_fuse.differences.explaining.explain_verdict import of_lora, verdict

    way = explained.way
    return {
        "verdict": verdict(explained),
        "equal": explained.is_equal,
        "exact": bool(way and not explained.missed and not explained.unexplained),
        "way": way.way.key if way else None,
        "other_base": explained.is_other_base,
        "cosine": explained.cosine,
        "rows": explained.rows,
        "loras": [
            {
                "name": lora.name,
                "file": str(lora.path),
                "found": lora.found,
                "scale": lora.scale,
                "error": _finite(lora.error),
                "smallest": _finite(lora.smallest),
                "cosine": lora.cosine,
                "says": of_lora(lora, explained),
                "blocks": {block: {"scale": scale, "error": error} for block, (scale, error) in lora.by_block.items()},
            }
            for lora in explained.loras
        ],
        "blocks": [
            {
                "block": one.block,
                "values": one.values,
                "differing": one.differing,
                "relative_norm": one.relative,
                "left_norm": one.left,
                "rank": one.rest.rank if one.rest else None,
                "full": one.rest.full if one.rest else None,
            }
            for one in explained.blocks
        ],
        "tensors": {
            one.name: {
                "values": one.values,
                "differing": one.differing,
                "relative_norm": one.relative,
                "explained": one.explained,
            }
            for one in explained.tensors
        },
        "only_base": list(explained.pair.only_base),
        "only_checkpoint": list(explained.pair.only_other),
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
