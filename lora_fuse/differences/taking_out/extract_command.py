"""The command ``extract``: its options, and a table of what is left of each weight's difference."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_fuse.machine import progress, text

if TYPE_CHECKING:
    from lora_fuse.differences.taking_out.extraction import Extracted

HEAD = ("weight", "in the LoRA", "left", "before rounding", "equal", "difference")


def add_extract(commands: Any) -> None:
    """Add the command to a parser's."""
    extract: argparse.ArgumentParser = commands.add_parser(
        "extract", help="write the difference of a checkpoint from its base as a LoRA"
    )
    extract.add_argument(
        "checkpoint",
        type=text.place,
        metavar="CKPT",
        help="pipeline, component or file; hf://OWNER/NAME@COMMIT: a pipeline on the Hub, read there",
    )
    extract.add_argument("--base", type=text.place, required=True, metavar="BASE", help="what it came from, as CKPT")
    extract.add_argument("--rank", type=int, metavar="R", help="of every module's factors")
    extract.add_argument(
        "--residual",
        type=float,
        metavar="X",
        help="the share of each module's difference that may be left: each gets the least rank that does",
    )
    extract.add_argument("-o", "--out", type=Path, required=True, metavar="OUT", help="the .safetensors file to write")
    extract.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the factors (float32)"
    )
    extract.add_argument(
        "--matrices-only", action="store_true", help="leave out biases, norms and whole differences: diffusers' loader"
    )
    extract.add_argument("--replace", action="store_true", help="replace OUT even if it was not extracted here")
    extract.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    extract.set_defaults(run=_extract)


def _extract(options: argparse.Namespace) -> int:
    from lora_fuse.differences import opened
    from lora_fuse.differences.taking_out.extraction import extract

    with opened(options.checkpoint, options.base) as (checkpoint, base):
        made = extract(
            checkpoint,
            base,
            options.out,
            rank=options.rank,
            residual=options.residual,
            dtype=options.dtype,
            matrices_only=options.matrices_only,
            replace=options.replace,
            show_progress=not options.json,
        )
    if options.json:
        text.say(json.dumps(extract_answer(made), sort_keys=True))
    else:
        _print(made)
    return 0


def _print(made: Extracted) -> None:
    rows = [HEAD]
    for weight in made.weights:
        left = weight.left
        numbers = (f"{left.residual:.3g}", f"{left.before_rounding:.3g}", f"{left.equal / left.size:.2%}")
        rows.append((weight.name, weight.form, *numbers, f"{left.difference**0.5:.3g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    for row in rows:
        text.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    total = made.total
    out = [weight for weight in made.weights if weight.key is None]
    kept = len(made.weights) - len(out)
    text.say(
        f"extracted: {made.path}, {progress.human_bytes(made.file.size)}, {kept} of {len(made.weights)} weights that "
        f"differ; {made.unchanged} do not"
    )
    text.say(
        f"  fused into {made.pair.names[1]} at 1, {total.residual:.3g} of the difference is left "
        f"({total.before_rounding:.3g} before rounding); {total.equal / total.size:.2%} of these elements are CKPT's"
    )
    if out:
        text.say(f"  {len(out)} weights are left out, first {out[0].name}")
    for side, names in (("BASE", made.pair.only_base), ("CKPT", made.pair.only_other)):
        if names:
            text.say(f"  {len(names)} weights are in {side} alone, and in no LoRA, first {names[0]}")
    text.say(f"  {made.file.sha256}  {made.path.name}")


def extract_answer(made: Extracted) -> dict[str, Any]:
    """The result as JSON."""
    from lora_fuse.differences.taking_out.extraction import weight_entry

    total = made.total
    return {
        "out": str(made.path),
        "size": made.file.size,
        "sha256": made.file.sha256,
        "residual": total.residual,
        "before_rounding": total.before_rounding,
        "equal": total.equal / total.size,
        "unchanged": made.unchanged,
        "weights": {weight.name: {**weight_entry(weight), "rank": weight.rank} for weight in made.weights},
        "left_out": [weight.name for weight in made.weights if weight.key is None],
        "only_base": list(made.pair.only_base),
        "only_checkpoint": list(made.pair.only_other),
    }
