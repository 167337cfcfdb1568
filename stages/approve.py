"""``python -m stages.approve --reason "…" [--case NAME …] [--add]``: make this run's pictures goldens.

Nothing else ever writes a golden. Refused when the weights are wrong, when merged and unfused disagree (a golden of a
broken merge would hide it), or when no commit says how the pictures were made. The run itself does not pass by it: its
verdict stays, and the next run is compared with the new goldens.
"""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from lora_fuse.cli import guarded
from lora_fuse.errors import BadConfig, CheckFailed
from lora_fuse.provenance import this_person
from lora_fuse.records import from_json
from lora_fuse.regression.approval import check_repeatable, check_weights, read_pictures
from lora_fuse.regression.goldens import Approval, Candidates, Goldens
from lora_fuse.workplace import holding
from stages.artifacts import GOLDEN, HERE, Artifacts, read_object, read_text
from stages.config import load


def approve(reason: str, only: list[str], add: bool, at: Artifacts = HERE) -> int:
    """Copy the candidates to `artifacts/golden/RECIPE/KEY/`, each with its record, and who approved it and why."""
    found = from_json(Candidates, read_text(at.candidates, "regress"), str(at.candidates))
    if not set(only) <= set(found.cases) or not reason.strip():
        raise BadConfig(
            f"a --reason and known cases are needed: got {reason!r} and {only}, of {', '.join(found.cases)}"
        )
    chosen = {name: found.cases[name] for name in only or found.cases}
    provenance = next(iter(chosen.values())).provenance
    check_weights(found.manifest_sha256, chosen, read_object(at.verify, "verify"), at.verify)
    check_repeatable(provenance, Path.cwd())
    if load() != load([f"recipe={provenance.recipe}"]):
        raise CheckFailed(
            f"params.yaml is not what recipe {provenance.recipe} composes to: make a recipe of these overrides, commit "
            "it and run it; nothing was approved"
        )
    pictures, goldens = read_pictures(at.images, chosen), Goldens(GOLDEN / provenance.recipe)
    approval = Approval(this_person(Path.cwd()), datetime.now(UTC).isoformat(timespec="seconds"), reason.strip(), ())
    for name, candidate in chosen.items():
        print(f"approved: {goldens.approve(pictures[name], candidate, approval, beside=add)}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.approve", description="Approve this run's pictures.")
    parser.add_argument("--reason", required=True, help="why these pictures are right; kept beside them")
    parser.add_argument("--case", action="append", default=[], help="only this case; may be given again")
    parser.add_argument("--add", action="store_true", help="keep the goldens that the case has, and allow this one too")
    given = parser.parse_args()
    sys.exit(guarded(holding(HERE.root)(lambda: approve(given.reason, given.case, given.add))))
