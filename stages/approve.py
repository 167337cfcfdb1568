"""``python -m stages.approve --reason "…" [--case NAME …] [--add] [--variant NAME]``: make a run's pictures goldens.

``--bind`` approves no picture: it writes the list (`SHA256SUMS`) of every folder of goldens that has none, as they are.

Nothing else ever writes a golden. Refused when the weights are wrong, when merged and unfused disagree (a golden of a
broken merge would hide it), or when no commit says how the pictures were made. The run itself keeps its verdict.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from lora_fuse.errors import BadConfig
from lora_fuse.machine import Console, OnceParser, staging
from lora_fuse.recipe import Artifacts, checkout, paths, records
from lora_fuse.regression import approval, candidates, goldens, run_record, weight_check
from stages.config import check_declared, load
from stages.run import PLAIN, next_commands, parse, run


def approve(reason: str, only: list[str], add: bool, at: Artifacts = paths.HERE, console: Console = PLAIN) -> int:
    """Copy the candidates to `artifacts/golden/RECIPE/KEY/`, each with its record: who approved it and why."""
    text = paths.read_text(at.candidates, "regress")
    found = records.from_json(candidates.Candidates, text, str(at.candidates))
    if not set(only) <= set(found.cases) or not reason.strip():
        known = ", ".join(found.cases)
        raise BadConfig(f"a --reason and known cases are needed: got {reason!r} and {only}, of {known}")
    chosen = {name: found.cases[name] for name in only or found.cases}
    recipe = next(iter(chosen.values())).provenance.recipe
    run = records.from_json(run_record.RunRecord, paths.read_text(at.run, "regress", force=True), str(at.run))
    approval.check_weights(found.manifest_sha256, chosen, weight_check.read_weight_check(at.verify), at.verify)
    approval.check_repeatable(run, text, Path.cwd())
    approval.check_asked(chosen, *check_declared(recipe, at.variant).asked)
    pictures = approval.read_pictures(at.images, chosen)
    approved = goldens.Goldens(paths.GOLDEN / recipe)
    signed = goldens.Approval(
        checkout.this_person(Path.cwd()), datetime.now(UTC).isoformat(timespec="seconds"), reason.strip(), ()
    )
    written: list[str] = []
    try:
        for name, one in chosen.items():
            written.append(str(approved.approve(pictures[name], one, run, signed, beside=add)))
    finally:  # if one is refused, those before it are approved
        console.done("approved", *written, facts={"goldens": written})
    return 0


def bind(reason: str, console: Console = PLAIN) -> int:
    """List the goldens of every recipe whose folders have no list, after a look at each."""
    if not reason.strip():
        raise BadConfig("a --reason is needed: it is kept in the list")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    remark = f"bound by {checkout.this_person(Path.cwd())}, {now}: {reason.strip()}"
    recipes = sorted(path for path in paths.GOLDEN.glob("*") if path.is_dir())
    written = [str(path) for recipe in recipes for path in goldens.Goldens(recipe).bind(remark)]
    console.done("bound", *(written or ["nothing: every folder of goldens has its list"]), facts={"lists": written})
    return 0


def approve_of(given: argparse.Namespace, console: Console) -> int:
    """`approve` of the main build, or of a variant; or `bind`."""
    if given.bind:
        if given.case or given.variant:
            raise BadConfig("--bind is for all goldens that have no list; leave out --case and --variant")
        with next_commands(paths.HERE):
            return bind(given.reason, console)
    at = paths.HERE if given.variant is None else Artifacts.of_variant(given.variant, load(variant=given.variant))
    with next_commands(at), staging.holding(at.root):
        return approve(given.reason, given.case, given.add, at, console)


if __name__ == "__main__":
    parser = OnceParser(prog="python -m stages.approve")
    parser.add_argument("--reason", required=True, help="why these pictures are right; kept beside them")
    parser.add_argument("--case", action="append", default=[], help="only this case; may be given again")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--add", action="store_true", help="keep the goldens that the case has, and allow this one too")
    what.add_argument("--bind", action="store_true", help="approve nothing, list goldens that have no list")
    parser.add_argument("--variant", help="a variant's pictures, instead of the main build's")
    given, said = parse(parser)
    sys.exit(run("approve", said, lambda: approve_of(given, said)))
